"""Tests beside other libraries, each in an environment that has it; they skip where it is missing."""
