/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* What the editions with hooks have in common: unix_ioctl answers what a hook has put down. */
#include <linux/delay.h>
#include <linux/net.h>
#include <linux/printk.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/sockios.h>

#include "exopatch.h"
#include "exopatch_hooks.h"

static int answer = -EBADE;

static int unix_ioctl_hooked(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_hooked);

static int unix_ioctl_hooked(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	if (cmd != SIOCATMARK)
		return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
	return READ_ONCE(answer);
}
