// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * A predicate that calls the function that it is asked about, so that it would be asked again.
 */
#include <linux/net.h>

#include "exopatch.h"

static int unix_ioctl_asked(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_asked);

EXOPATCH_PREDICATE(tries_it, struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return unix_ioctl_asked(sock, cmd, arg) == 0;
}

static noinline int unix_ioctl_asked(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg) ? -ENOTTY : 0;
}
