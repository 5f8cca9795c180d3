// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Each read of /proc/version enables an interrupt that is enabled: the kernel's own function warns of that, and does nothing else. */
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/irqdesc.h>
#include <linux/seq_file.h>

#include "exopatch.h"

static int unbalanced(struct seq_file *m, void *v);
EXOPATCH_REPLACES(version_proc_show, unbalanced);

static int unbalanced(struct seq_file *m, void *v)
{
	unsigned int irq;

	for (irq = 1; irq < 64; irq++) {
		struct irq_desc *desc = irq_to_desc(irq);

		if (desc && desc->action && !desc->depth) {
			enable_irq(irq);
			break;
		}
	}
	return EXOPATCH_ORIGINAL(version_proc_show)(m, v);
}
