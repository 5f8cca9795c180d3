// SPDX-License-Identifier: Apache-2.0 OR MIT
/* The second generation of a pair of functions; see pair.h. */
#define GENERATION 2
#define ANSWER (-ETIME)
#include "pair.h"
