/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Two functions that must be of one generation: sock_ioctl hands unix_ioctl the argument of SIOCATMARK in a form that only the same generation
 * can read. The answers tell them apart: each generation has an ANSWER of its own, an edition that cannot read what it was handed says EBADE,
 * and the original, for which it is no address of a user, EFAULT. Callers give the address of an int.
 *
 * From the one to the other it takes a while, spent asleep or not; who is called "sl..." stays there until a signal comes.
 */
#include <linux/delay.h>
#include <linux/fs.h>
#include <linux/net.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/sockios.h>

#include "exopatch.h"

static long sock_ioctl_pair(struct file *file, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(sock_ioctl, sock_ioctl_pair);
static int unix_ioctl_pair(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_pair);

static long sock_ioctl_pair(struct file *file, unsigned int cmd, unsigned long arg)
{
	if (cmd != SIOCATMARK)
		return EXOPATCH_ORIGINAL(sock_ioctl)(file, cmd, arg);
	/* Not by a string: its address would be one that is handed out, and the room never used again. */
	if (current->comm[0] == 's' && current->comm[1] == 'l')
		while (!signal_pending(current))
			schedule_timeout_interruptible(MAX_SCHEDULE_TIMEOUT);
	else if (current->pid & 1)
		usleep_range(50, 200);
	else
		udelay(50);
	return EXOPATCH_ORIGINAL(sock_ioctl)(file, cmd, ~(arg | GENERATION));
}

static int unix_ioctl_pair(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	if (cmd != SIOCATMARK)
		return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
	return (~arg & 3) == GENERATION ? ANSWER : -EBADE;
}
