/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Makes static branches test their keys. `exopatch build` has the compiler include this before an edition's source.
 *
 * The kernel patches the branches that it has in its own tables, when a key is switched; it would never know of those of an
 * edition. A test of the key that the kernel switches is right at once, and takes no entry in any table (section __jump_table).
 * Whatever static keys are used for goes through the four names below: tracepoints, dynamic debug, and static_branch_likely().
 */
#ifndef EXOPATCH_KEYS_H
#define EXOPATCH_KEYS_H

#include <linux/compiler.h>
#include <linux/jump_label.h>

#ifdef CONFIG_JUMP_LABEL

/*
 * Whether the branch is taken: what is at its place is a jump if KEY is on and not BRANCH, or off and BRANCH. A key is on unless
 * it is 0: while it is being switched on it is negative.
 */
#define exopatch_static_branch(KEY, BRANCH) ((READ_ONCE((KEY)->enabled.counter) != 0) != (BRANCH))

#define arch_static_branch(KEY, BRANCH) exopatch_static_branch(KEY, BRANCH)
#define arch_static_branch_jump(KEY, BRANCH) exopatch_static_branch(KEY, BRANCH)
#define static_key_false(KEY) arch_static_branch(KEY, false)
#define static_key_true(KEY) (!arch_static_branch(KEY, true))

#endif
#endif
