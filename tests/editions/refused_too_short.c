// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Replaces a function that is over before a jump would be. */
#include "exopatch.h"

static void too_short(void);
EXOPATCH_REPLACES(abort, too_short);

static void too_short(void)
{
}
