"""Kernels: one file per family, each kernel NAME made by a function `build_NAME`.

A kernel's file opens with what is parallel over what. Integers are cast by u32() or i32() after
each step, floats are written f32(...): the gates refuse double precision.
"""
