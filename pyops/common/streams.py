"""The one table of Philox streams: the last counter word of every Philox block that the package computes.

Two values never coincide when they differ in key, stream or another counter word. A key is either the *base seed* that
a user gives to an optimizer or a *seed* that was derived from a base seed.

=======  =====================  ===========================  ===========================================================
stream   name                   key                          counter (block low, block high or step, then)
=======  =====================  ===========================  ===========================================================
0        GAUSSIAN               seed of a direction          block of 4 elements, tensor id
1        RADEMACHER             seed of a direction          block of 128 elements, tensor id
2        ROUNDING               seed of a direction or of    block of 8 elements, tensor id
                                an SM3 step
3        LEFT                   seed of a direction          block of 4 elements of U, tensor id
4        RIGHT                  right seed of low rank       block of 4 elements of V, tensor id
3        STEP_SEEDS             base seed of MeZO            step, direction: the seed of a direction
4        POOL_SEEDS             base seed of SeedPool        candidate, 0: the candidate's seed
5        DRAW_SEEDS             base seed of LISA or         round, candidate: the rank of a candidate in a draw
                                HalfFineTuning
6        RIGHT_SEEDS            base seed of MeZO            step // period, 0: the right seed of low rank
6        SM3_SEEDS              base seed of SM3             0, 0: the first seed of SM3's stochastic rounding
=======  =====================  ===========================  ===========================================================

Streams 0 to 4 of the first five rows belong to the definition zo/1. Rows with the same number:

- 3 and 4 twice: LEFT and RIGHT have derived seeds as keys, STEP_SEEDS and POOL_SEEDS have base seeds.
- 6 twice: a MeZO and an SM3 with one base seed derive the same first seed. MeZO keys V with it, in stream 4, and SM3
  keys rounding with it, in stream 2, so no random bit is used twice.
"""

from __future__ import annotations

GAUSSIAN, RADEMACHER, ROUNDING, LEFT, RIGHT = 0, 1, 2, 3, 4
STEP_SEEDS, POOL_SEEDS, DRAW_SEEDS, RIGHT_SEEDS, SM3_SEEDS = 3, 4, 5, 6, 6
