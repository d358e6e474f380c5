"""What the folder of a saved reward model holds, and folders that are there whole or not at all."""
