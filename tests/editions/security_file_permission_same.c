// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition of a function whose result BPF programs may give; it changes nothing. */
#include <linux/fs.h>
#include <linux/security.h>

#include "exopatch.h"

static int security_file_permission_same(struct file *file, int mask);
EXOPATCH_REPLACES(security_file_permission, security_file_permission_same);

static int security_file_permission_same(struct file *file, int mask)
{
	return EXOPATCH_ORIGINAL(security_file_permission)(file, mask);
}
