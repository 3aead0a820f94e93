/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* A capture of translations that the tracer does not use: a netfilter link. Only as much as tells what it would cost. */
#include "record.h"

#define NF_ACCEPT 1
#define IPS_CONFIRMED (1 << 3)
#define NFCT_PTRMASK (~7UL)

struct hook {
	const void *state;
	const void *skb;
};

/* struct nf_conntrack_tuple_hash, with struct nf_conntrack_tuple as it is since 2.6.20 */
struct side {
	__u64 node[2];
	__u32 src[4];
	__u16 src_port;
	__u16 family;
	__u32 dst[4];
	__u16 dst_port;
	__u8 protocol;
	__u8 direction;
};

struct rewritten {
	__u64 created;
	struct address backend;
	struct address snat;
	__u16 backend_port;
	__u16 snat_port;
	__u32 reserved;
};

BPF_TABLE("hash", struct tuple, struct rewritten, rewrites, 131072);
BPF_TABLE("array", int, __u64, met, 1);

static __always_inline void copy_v4(struct address *to, const __u32 from[4])
{
	to->words[2] = 0xffff0000;
	to->words[3] = from[0];
}

static __always_inline void copy_v6(struct address *to, const __u32 from[4])
{
	to->words[0] = from[0];
	to->words[1] = from[1];
	to->words[2] = from[2];
	to->words[3] = from[3];
}

int translations(struct hook *ctx)
{
	const void *skb = ctx->skb, *ct;
	struct rewritten value = {};
	struct tuple key = {};
	unsigned long status = 0;
	struct side sides[2];
	int zero = 0;
	__u64 *count;

	ct = (const void *)(*(volatile __u64 *)(skb + OFFSET_sk_buff___nfct) & NFCT_PTRMASK);
	if (!ct || bpf_probe_read_kernel(&status, sizeof(status), ct + OFFSET_nf_conn__status) ||
	    status & IPS_CONFIRMED)
		return NF_ACCEPT;
	if (bpf_probe_read_kernel(sides, sizeof(sides), ct + OFFSET_nf_conn__tuplehash))
		return NF_ACCEPT;
	if (sides[0].family == 2) {
		copy_v4(&key.src, sides[0].src);
		copy_v4(&key.dst, sides[0].dst);
		copy_v4(&value.backend, sides[1].src);
		copy_v4(&value.snat, sides[1].dst);
	} else {
		copy_v6(&key.src, sides[0].src);
		copy_v6(&key.dst, sides[0].dst);
		copy_v6(&value.backend, sides[1].src);
		copy_v6(&value.snat, sides[1].dst);
	}
	key.src_port = sides[0].src_port;
	key.dst_port = sides[0].dst_port;
	key.protocol = sides[0].protocol;
	value.backend_port = sides[1].src_port;
	value.snat_port = sides[1].dst_port;
	value.created = bpf_ktime_get_boot_ns();
	rewrites.update(&key, &value);
	count = met.lookup(&zero);
	if (count)
		__sync_fetch_and_add(count, 1);
	return NF_ACCEPT;
}
