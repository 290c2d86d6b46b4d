"""Interpolation of whole videos: decoding, exact times, encoding, muxing, and jobs that can be stopped, resumed and shared."""
