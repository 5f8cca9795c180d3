// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Calls a function of whose name every kernel has several. */
#include <linux/net.h>

#include "exopatch.h"

extern void init_once(void *object);
static int unix_ioctl_ambiguous(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_ambiguous);

static int unix_ioctl_ambiguous(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	init_once(sock);
	return 0;
}
