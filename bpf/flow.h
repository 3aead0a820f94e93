/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Flows: what only conntrack tells of, from its entry's NEW to its DESTROY. Forwarded connections whose destination
 * this node rewrote, and UDP. A row is made at DESTROY of the totals of the entry's whole life; user space
 * (tracer/kernel/flows.py) makes interim rows of periodic dumps and takes off here what they said. */
#ifndef TRACER_FLOW_H
#define TRACER_FLOW_H

#include "datagram.h"

/* How long after its birth the end of a TCP entry may be the answer to its first SYN. */
#define KEEP_NS 5000000000ULL

/* An attribute's header as the little-endian word it is: length, then type. */
#define ATTRIBUTE(length, type) ((__u32)(length) | (__u32)(type) << 16)

#define CTA_STATUS 3
#define CTA_PROTOINFO 4
#define CTA_TIMEOUT 7
#define CTA_COUNTERS_ORIG 9
#define CTA_COUNTERS_REPLY 10
#define CTA_TYPE_MASK 0x3fff
#define IPS_SEEN_REPLY 0x02
#define IPS_ASSURED 0x04
#define IPS_NAT_CLASH 0x1000
/* include/uapi/linux/netfilter/nf_conntrack_tcp.h: the states that a TCP entry can end in */
#define TCP_CONNTRACK_TIME_WAIT 7
#define TCP_CONNTRACK_CLOSE 8

/* CTA_COUNTERS_*: packets, then bytes. */
struct message_counters {
	__u32 packets_header;
	__u32 packets[2];
	__u32 bytes_header;
	__u32 bytes[2];
};

/* What a DESTROY says of the entry's life. */
struct entry_end {
	struct message_counters sent;
	struct message_counters received;
	__u32 status;
	__u32 left;
	__u8 state;
	__u8 counters; /* bits: sent 1, received 2 */
};

static __always_inline __u64 big_endian(const __u32 words[2])
{
	return (__u64)bpf_ntohl(words[0]) << 32 | bpf_ntohl(words[1]);
}

static __always_inline bool counters_fit(const struct message_counters *counters)
{
	return counters->packets_header == ATTRIBUTE(12, 1) && counters->bytes_header == ATTRIBUTE(12, 2);
}

/* Walks the attributes from `offset`, which is behind the tuples; there are eight at the most (zone, id, status,
 * timeout, counters, timestamp, protocol; ctnetlink_conntrack_event). */
static __always_inline void read_end(struct __sk_buff *skb, __u32 offset, struct entry_end *end)
{
	struct {
		__u32 nest;
		__u32 header;
		__u8 value;
	} state;
	__u32 header, value;

#pragma unroll
	for (int i = 0; i < 8; i++) {
		__u32 length;

		if (bpf_skb_load_bytes(skb, offset, &header, sizeof(header)))
			return;
		length = header & 0xffff;
		switch (header >> 16 & CTA_TYPE_MASK) {
		case CTA_STATUS:
			if (length == 8 && !bpf_skb_load_bytes(skb, offset + 4, &value, sizeof(value)))
				end->status = bpf_ntohl(value);
			break;
		case CTA_TIMEOUT:
			if (length == 8 && !bpf_skb_load_bytes(skb, offset + 4, &value, sizeof(value)))
				end->left = bpf_ntohl(value);
			break;
		case CTA_COUNTERS_ORIG:
			if (length == 4 + sizeof(end->sent) &&
			    !bpf_skb_load_bytes(skb, offset + 4, &end->sent, sizeof(end->sent)) &&
			    counters_fit(&end->sent))
				end->counters |= 1;
			break;
		case CTA_COUNTERS_REPLY:
			if (length == 4 + sizeof(end->received) &&
			    !bpf_skb_load_bytes(skb, offset + 4, &end->received, sizeof(end->received)) &&
			    counters_fit(&end->received))
				end->counters |= 2;
			break;
		case CTA_PROTOINFO:
			if (length >= 16 && !bpf_skb_load_bytes(skb, offset + 4, &state, 9) &&
			    (state.nest >> 16 & CTA_TYPE_MASK) == 1 && state.header == ATTRIBUTE(5, 1))
				end->state = state.value;
			break;
		}
		if (length < 4)
			return;
		offset += (length + 3) & ~3;
	}
}

/* null unless conntrack proves it: both sides said goodbye; a RST was the answer to the first SYN, or ended what had
 * been assured. */
static __always_inline __u16 flow_result(const struct entry_end *end)
{
	if (end->state == TCP_CONNTRACK_TIME_WAIT)
		return 0;
	if (end->state != TCP_CONNTRACK_CLOSE)
		return RESULT_OPEN;
	if (end->status & IPS_ASSURED)
		return ECONNRESET;
	return end->status & IPS_SEEN_REPLY ? RESULT_OPEN : ECONNREFUSED;
}

/* False if the ring is full. */
static __always_inline bool emit_flow(const struct tuple *tuple, const struct translation *translation,
				      const struct owner *owner, const struct entry_end *end, __u8 flags)
{
	struct record *record = bpf_ringbuf_reserve(RECORDS, sizeof(*record), 0);

	if (!record)
		return false;
	__builtin_memset(record, 0, sizeof(*record));
	record->tuple = *tuple;
	record->tuple.zone = 0;
	record->conn_id = next_conn_id();
	record->ts = bpf_ktime_get_boot_ns();
	record->duration_ns = translation->created ? record->ts - translation->created : 0;
	record->flags = flags | FLAG_CLOSED | (is_v4(&tuple->dst) ? FLAG_IPV4 : 0);
	if (translation->source == SOURCE_CONNTRACK) {
		record->started = translation->created;
		record->flags |= FLAG_OPENED;
	}
	if (end->counters == 3) {
		record->flags |= FLAG_COUNTED;
		record->packets_sent = big_endian(end->sent.packets);
		record->bytes_sent = big_endian(end->sent.bytes);
		record->packets_received = big_endian(end->received.packets);
		record->bytes_received = big_endian(end->received.bytes);
	}
	record->backend = translation->backend;
	record->backend_port = translation->backend_port;
	record->snat = translation->snat;
	record->snat_port = translation->snat_port;
	record->ct_id = translation->ct_id;
	record->ct_zone = translation->zone;
	record->nat = translation->nat;
	record->nat_source = translation->source;
	record->result = flow_result(end);
	record->ct_state = end->state;
	record->ct_status = end->status;
	record->ct_left = end->left > 0xffff ? 0xffff : end->left;
	record->role = ROLE_FORWARDED;
	if (owner) {
		record->role = ROLE_CLIENT;
		record->netns = owner->netns;
		if (owner->pid) {
			record->flags |= FLAG_PROCESS;
			record->pid = owner->pid;
			record->cgroup_id = owner->cgroup_id;
			__builtin_memcpy(record->comm, owner->comm, sizeof(record->comm));
		}
		if (owner->rewritten) {
			record->tuple.dst = owner->dialled;
			record->tuple.dst_port = owner->dialled_port;
			record->nat = NAT_DNAT | (translation->nat & NAT_SNAT);
			record->nat_source = SOURCE_SOCKET;
		} else if (owner->undialled && !(translation->nat & NAT_DNAT)) {
			record->nat = NAT_UNKNOWN;
		}
	}
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return true;
}

/* A flow has ended, and there was no room for its row. */
static __always_inline void lose_flow(void)
{
	count(COUNT_FLOWS);
	count(COUNT_LOST_FLOW_RING);
}

/* An entry is gone that no TCP socket has claimed. `offset` is where the attributes behind the tuples begin.
 *
 * `raced`: the translation is not in the map; another of the same tuple is, or was. Datagrams that two CPUs take through
 * conntrack at once make two entries; where they lead to two backends, the second stays for a second and is not
 * announced (nf_ct_resolve_clash_harder, 5.7): only its end tells. */
static __always_inline void flow_ends(struct __sk_buff *skb, __u32 offset, const struct tuple *tuple,
				      struct translation *translation, bool raced)
{
	struct entry_end end = {};
	struct tuple key = *tuple;
	struct owner *owner = NULL;
	__u8 nat = translation->nat, flags = 0;
	__u64 paused;

	if (translation->conn_id == CLAIM_LOST || translation->conn_id == CLAIM_OVER)
		goto out;
	/* Born while the tracer stops: its socket, if it is one's, has not been taken in (connection.h). */
	paused = control(CONTROL_PAUSE);
	if (paused && translation->created >= paused)
		goto out;
	key.zone = 0;
	/* A socket that is still open may not have claimed its entry, but told of itself at connect(). */
	if (tuple->protocol == IPPROTO_UDP) {
		owner = bpf_map_lookup_elem_(OWNERS, &key);
		if (owner && owner->rewritten)
			nat |= NAT_DNAT;
	}
	read_end(skb, offset, &end);
	if (raced && !(end.status & IPS_NAT_CLASH)) {
		count(COUNT_STALE_DESTROY);
		return;
	}
	if (tuple->protocol == IPPROTO_TCP && !(end.status & IPS_ASSURED) &&
	    bpf_ktime_get_boot_ns() - translation->created < KEEP_NS) {
		translation->ended = ENDED;
		count(COUNT_KEPT);
		flags = FLAG_PROVISIONAL;
	}
	if (!owner && !(nat & NAT_DNAT)) {
		if (!flags)
			count(COUNT_TRANSIT);
	} else if (!(ROLES & 1 << (owner ? ROLE_CLIENT : ROLE_FORWARDED)) || (ONLY_VIRTUAL && !(nat & NAT_DNAT)) ||
		   excluded_destination(owner && owner->rewritten ? &owner->dialled : &tuple->dst)) {
		/* left out by option: not offered */
	} else if (emit_flow(tuple, translation, owner, &end, flags)) {
		count(COUNT_FLOWS);
	} else if (flags) {
		translation->ended = ENDED_UNTOLD;
	} else {
		lose_flow();
	}
	if (raced || flags)
		return; /* its socket, or user space, removes it */
	if (owner && owner->released)
		DELETE(OWNERS, &key);
out:
	if (!raced)
		DELETE(TRANSLATIONS, tuple);
}

#endif
