// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Replaces a function that no kernel has. */
#include "exopatch.h"

static int missing_function(void);
EXOPATCH_REPLACES(exopatch_test_no_kernel_has_this, missing_function);

static int missing_function(void)
{
	return 0;
}
