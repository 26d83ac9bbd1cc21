"""What holds for all tests: they run on the CPU, also where there is a GPU.

They compare numbers bit for bit and know what a CPU's run says; GPUs are checked by `benchmarks/gpu.py`.
"""

import os

os.environ['CUDA_VISIBLE_DEVICES'] = ''  # Before anything asks for them, also in the processes of tests.
