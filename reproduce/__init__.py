"""w2vrep: reproduce and judge a wav2vec 2.0 study (ICSL in pretraining, RVQ before CTC).

The rooms of the package and the order in which they may import each other are in ARCHITECTURE.md.
"""

__version__ = "0.1.0"
