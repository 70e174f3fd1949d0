"""The pipeline around the method: the only place that knows Prefect, Ray and MLflow."""
