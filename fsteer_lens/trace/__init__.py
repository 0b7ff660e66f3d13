"""The trace: what steering did, row by row, layer by layer, token by token."""
