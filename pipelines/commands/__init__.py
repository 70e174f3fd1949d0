"""What the commands plan, audit and evaluate do."""
