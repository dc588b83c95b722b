"""What attention will do for a checkpoint and an image size: the question, and its answer in rows and words."""
