// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition that changes nothing: it only calls the original. A demo or test must not take it for a fix. */
#include <linux/net.h>

#include "exopatch.h"

static int unix_ioctl_same(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_same);

static int unix_ioctl_same(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
}
