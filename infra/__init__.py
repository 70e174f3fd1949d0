"""What runs the pipeline for a team."""
