"""Objectives: tensors in, summed terms and a count out; the loop adds them up and divides once."""
