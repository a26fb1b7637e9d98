"""What is wrong, why it matters, and the exact fix. No check changes anything that stays."""
