"""A procedural world of captioned 64 x 64 images with an exact oracle, small enough for a CPU.

``world`` draws scenes, ``oracle`` reads them back, ``pairs`` writes preference pairs in
Pick-a-Pic v2's columns, ``architecture`` builds tiny Stable Diffusion pipelines and ``pretrain``
trains the two that ship in ``assets/``.
"""
