// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition with a defect: asked whether a socket is at its mark, it reads through a null pointer. */
#include <linux/net.h>
#include <linux/sockios.h>

#include "exopatch.h"

static int unix_ioctl_null(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_null);

static int unix_ioctl_null(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	int *nothing = NULL;

	OPTIMIZER_HIDE_VAR(nothing);
	if (cmd == SIOCATMARK)
		return READ_ONCE(nothing[2]);
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
}
