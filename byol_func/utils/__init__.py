"""Namesakes of the files of the official `byol/utils`, for side-by-side reading."""
