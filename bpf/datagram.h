/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Connected UDP sockets: whose a UDP entry of conntrack is.
 *
 * No state change tells when a UDP socket connects. But its tuple is known as long as it is open, and an entry outlives
 * its last packet by 30 s at least. So a socket claims its entry when it is closed, and one that stays open when the
 * iterator meets it; the row is made when the entry ends (flow.h). Where the connect probe runs, connect() tells. */
#ifndef TRACER_DATAGRAM_H
#define TRACER_DATAGRAM_H

#include "connection.h"

static __always_inline void describe_owner(struct owner *owner)
{
	struct process process;

	read_process_probed(&process);
	owner->pid = process.pid;
	owner->cgroup_id = process.cgroup_id;
	__builtin_memcpy(owner->comm, process.comm, sizeof(owner->comm));
}

/* Whether a UDP socket with this tuple can be the one that a translation of the node is for. */
static __always_inline bool datagram_wanted(const struct tuple *tuple, __u32 netns)
{
	return tuple->src_port && tuple->dst_port && wanted_netns(netns) &&
	       !(is_loopback(&tuple->src) && netns != NODE_NETNS);
}

/* Claims the translation for the socket's owner. `process` tells whether the caller is that process; `expected`, whether
 * a translation may still come. */
static __always_inline void claim_datagrams(const struct tuple *tuple, __u32 netns, bool process, bool released,
					    bool expected)
{
	struct owner owner = {}, *known = bpf_map_lookup_elem_(OWNERS, tuple);
	struct tuple key = *tuple;
	struct translation *translation = find_translation(&key);
	/* An earlier socket's, whose datagrams never came to conntrack: what comes now is this one's. */
	bool stale = known && known->released && !(translation && translation->conn_id == CLAIM_DATAGRAM);

	if (translation) {
		translation->conn_id = CLAIM_DATAGRAM;
	} else if (!expected) {
		if (known && released)
			DELETE(OWNERS, tuple);
		return;
	}
	if (known && !stale) {
		if (process && !known->pid)
			describe_owner(known);
		known->released = released;
		return;
	}
	owner.netns = netns;
	owner.released = released;
	owner.undialled = control(CONTROL_DIALS) != DIALS_ARE_PEERS;
	if (process)
		describe_owner(&owner);
	if (bpf_map_update_elem_(OWNERS, tuple, &owner, BPF_ANY)) {
		count(COUNT_LOST_OWNER_MAP);
		if (translation)
			translation->conn_id = 0;
	}
}

/* A socket is closed, in the context of who closes it. The type of `sk` is not known to the verifier. */
static __always_inline void datagrams_end(const void *sk)
{
	struct tuple tuple = {};
	__u32 netns, unsent = 1;

	if (!read_tuple_probed(sk, &tuple, IPPROTO_UDP))
		return;
	netns = read_netns_probed(sk);
	/* What it sent last may not have reached conntrack yet: it waits for its neighbour's address, in a queue, or for
	 * a softirq on another CPU. Until it is taken in there the socket is charged for it, one being none (sk_alloc). */
	PROBE(unsent, sk, OFFSET_sock__sk_wmem_alloc);
	if (datagram_wanted(&tuple, netns))
		claim_datagrams(&tuple, netns, true, true, unsent > 1);
}

/* The iterator meets an open socket. */
static __always_inline void visit_datagrams(const void *sk)
{
	struct tuple tuple = {};
	__u32 netns;
	__u8 state;

	READ(state, sk, OFFSET_sock_common__skc_state);
	if (state != BPF_TCP_ESTABLISHED || !read_tuple(sk, &tuple, IPPROTO_UDP))
		return; /* not connected */
	netns = read_netns(sk);
	if (datagram_wanted(&tuple, netns))
		claim_datagrams(&tuple, netns, false, false, false);
}

#endif
