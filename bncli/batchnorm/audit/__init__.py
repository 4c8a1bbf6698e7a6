"""What is wrong with running statistics, judged from their numbers."""
