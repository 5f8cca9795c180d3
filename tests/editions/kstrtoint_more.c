// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Numbers that the guest writes arrive one larger: a function of lib/, which the kernel makes no fentry sites in. */
#include <linux/kernel.h>

#include "exopatch.h"

static int kstrtoint_more(const char *s, unsigned int base, int *res);
EXOPATCH_REPLACES(kstrtoint, kstrtoint_more);

static int kstrtoint_more(const char *s, unsigned int base, int *res)
{
	int error = EXOPATCH_ORIGINAL(kstrtoint)(s, base, res);

	if (!error)
		*res += 1;
	return error;
}
