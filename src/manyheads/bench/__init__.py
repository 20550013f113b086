"""Measuring: tasks, speed, memory."""
