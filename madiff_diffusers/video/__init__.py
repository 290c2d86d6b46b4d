"""Video in, video out: reading, exact times, frames between frames, writing, and jobs that can be stopped and shared."""
