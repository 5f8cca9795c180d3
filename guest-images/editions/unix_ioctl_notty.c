// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * For kernels that already contain the fix of CVE-2026-52928: an AF_UNIX socket that is not a stream socket answers
 * SIOCATMARK with ENOTTY instead of EOPNOTSUPP, as for any request that a file does not know.
 */
#include <linux/net.h>
#include <linux/sockios.h>
#include <net/sock.h>

#include "exopatch.h"

static int unix_ioctl_notty(struct socket *sock, unsigned int cmd, unsigned long arg);
EXOPATCH_REPLACES(unix_ioctl, unix_ioctl_notty);

static int unix_ioctl_notty(struct socket *sock, unsigned int cmd, unsigned long arg)
{
	if (cmd == SIOCATMARK && sock->sk->sk_type != SOCK_STREAM)
		return -ENOTTY;
	return EXOPATCH_ORIGINAL(unix_ioctl)(sock, cmd, arg);
}
