// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition of what every UDP packet that arrives comes to: the original, and a witness that a softirq brought it. */
#include <linux/ip.h>
#include <linux/preempt.h>
#include <linux/skbuff.h>
#include <linux/udp.h>

#include "witness.h"

static int udp_rcv_seen(struct sk_buff *skb);
EXOPATCH_REPLACES(udp_rcv, udp_rcv_seen);

static int udp_rcv_seen(struct sk_buff *skb)
{
	witness(in_serving_softirq() && !in_hardirq() && ip_hdr(skb)->protocol == IPPROTO_UDP);
	return EXOPATCH_ORIGINAL(udp_rcv)(skb);
}
