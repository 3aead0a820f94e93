/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* What is not known when the programs are compiled, and put in when they are loaded (tracer/kernel/symbols.py): a
 * compiled program serves every run. The compiler sees an opaque value; the verifier sees a constant. */
#ifndef TRACER_SYMBOLS_H
#define TRACER_SYMBOLS_H

#define TEXT_OF(symbol) #symbol
#define TEXT(symbol) TEXT_OF(symbol)
#define VALUE(symbol)                                                    \
	({                                                               \
		__u64 value_of_symbol;                                   \
		asm("%0 = " TEXT(symbol) " ll" : "=r"(value_of_symbol)); \
		value_of_symbol;                                         \
	})

#define MAP(symbol) ((uintptr_t)bpf_pseudo_fd(1 /* BPF_PSEUDO_MAP_FD */, symbol))

/* The inode number of the node's network namespace. */
#define NODE_NETNS VALUE(NODE_NETNS_SYMBOL)
/* Tells this run's connection ids from others': 16 bits. */
#define RUN_ID VALUE(RUN_ID_SYMBOL)
#define RING_BYTES VALUE(RING_BYTES_SYMBOL)
#define YOUNG_SLOTS VALUE(YOUNG_SLOTS_SYMBOL)

#endif
