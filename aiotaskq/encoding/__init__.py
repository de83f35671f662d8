"""Encoding of messages, arguments, results and exceptions as bytes, and decoding."""
