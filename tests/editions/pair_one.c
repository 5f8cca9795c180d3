// SPDX-License-Identifier: Apache-2.0 OR MIT
/* The first generation of a pair of functions; see pair.h. */
#define GENERATION 1
#define ANSWER (-EXDEV)
#include "pair.h"
