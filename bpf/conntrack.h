/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* conntrack's own events, read from ctnetlink's messages as a socket filter sees them.
 *
 * The messages are user-space API (include/uapi/linux/netfilter/nfnetlink_conntrack.h). Their head has one layout
 * for all kernels since at least 5.10 (ctnetlink_conntrack_event): nlmsghdr, nfgenmsg, the original tuple, the
 * reply tuple, a zone if it is not 0, the id. It is loaded in one piece and every attribute header compared with
 * what it must be; whatever does not match is counted. So the program stays small enough for the 20 KiB of
 * net.core.optmem_max that an attached filter is charged to. */
#ifndef TRACER_CONNTRACK_H
#define TRACER_CONNTRACK_H

#include "flow.h"

#define IPCTNL_MSG_CT_NEW 0
#define IPCTNL_MSG_CT_DELETE 2
#define CTA_TUPLE_ORIG 1
#define CTA_TUPLE_REPLY 2
#define CTA_ID 12
#define CTA_ZONE 18
#define NLA_F_NESTED 0x8000

#define NEST(length, type) ATTRIBUTE(length, (type) | NLA_F_NESTED)

struct message_head {
	__u32 length;
	__u16 type;
	__u16 flags;
	__u32 sequence;
	__u32 port_id;
	__u8 family;
	__u8 version;
	__u16 resource;
};

/* CTA_TUPLE_PROTO: number, source port, destination port, each padded to four bytes. */
struct message_ports {
	__u32 nest;
	__u32 number_header;
	__u8 number;
	__u8 number_padding[3];
	__u32 src_header;
	__u16 src;
	__u16 src_padding;
	__u32 dst_header;
	__u16 dst;
	__u16 dst_padding;
};

struct message_tuple_v4 {
	__u32 nest;
	__u32 ip_nest;
	__u32 src_header;
	__u32 src;
	__u32 dst_header;
	__u32 dst;
	struct message_ports ports;
};

struct message_tuple_v6 {
	__u32 nest;
	__u32 ip_nest;
	__u32 src_header;
	__u32 src[4];
	__u32 dst_header;
	__u32 dst[4];
	struct message_ports ports;
};

/* What follows the tuples: [zone] id, or id and the status. */
struct message_tail {
	__u32 first_header;
	__u32 first;
	__u32 second_header;
	__u32 second;
};

struct message_v4 {
	struct message_head head;
	struct message_tuple_v4 original;
	struct message_tuple_v4 reply;
	struct message_tail tail;
};

struct message_v6 {
	struct message_head head;
	struct message_tuple_v6 original;
	struct message_tuple_v6 reply;
	struct message_tail tail;
};

_Static_assert(sizeof(struct message_v4) == 16 + 4 + 52 + 52 + 16, "ctnetlink's IPv4 head");
_Static_assert(sizeof(struct message_v6) == 16 + 4 + 76 + 76 + 16, "ctnetlink's IPv6 head");

static __always_inline bool ports_fit(const struct message_ports *ports)
{
	return ports->nest == NEST(sizeof(*ports), 2) && ports->number_header == ATTRIBUTE(5, 1) &&
	       ports->src_header == ATTRIBUTE(6, 2) && ports->dst_header == ATTRIBUTE(6, 3);
}

static __always_inline bool v4_fits(const struct message_tuple_v4 *tuple, __u16 type)
{
	return tuple->nest == NEST(sizeof(*tuple), type) && tuple->ip_nest == NEST(20, 1) &&
	       tuple->src_header == ATTRIBUTE(8, 1) && tuple->dst_header == ATTRIBUTE(8, 2) && ports_fit(&tuple->ports);
}

static __always_inline bool v6_fits(const struct message_tuple_v6 *tuple, __u16 type)
{
	return tuple->nest == NEST(sizeof(*tuple), type) && tuple->ip_nest == NEST(44, 1) &&
	       tuple->src_header == ATTRIBUTE(20, 3) && tuple->dst_header == ATTRIBUTE(20, 4) &&
	       ports_fit(&tuple->ports);
}

static __always_inline void copy_v6(struct address *to, const __u32 from[4])
{
	to->words[0] = from[0];
	to->words[1] = from[1];
	to->words[2] = from[2];
	to->words[3] = from[3];
}

static __always_inline void copy_ports(struct tuple *tuple, struct translation *translation,
				       const struct message_ports *original, const struct message_ports *reply)
{
	tuple->src_port = original->src;
	tuple->dst_port = original->dst;
	tuple->protocol = original->number;
	translation->backend_port = reply->src;
	translation->snat_port = reply->dst;
}

static __always_inline bool has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP;
}

/* Entries of other protocols have no ports, or other attributes in their place: looked at only when the head
 * did not fit, so that the usual event pays for one load. */
static __always_inline void count_misfit(struct __sk_buff *skb, __u32 number_offset)
{
	__u8 number;

	if (bpf_skb_load_bytes(skb, number_offset, &number, 1))
		number = IPPROTO_TCP; /* not even that: malformed */
	count(has_ports(number) ? COUNT_MALFORMED_EVENTS : COUNT_IGNORED_PROTOCOL);
}

static __always_inline bool read_v4(const struct message_v4 *message, struct tuple *tuple,
				    struct translation *translation)
{
	if (!v4_fits(&message->original, CTA_TUPLE_ORIG) || !v4_fits(&message->reply, CTA_TUPLE_REPLY) ||
	    message->original.ports.number != message->reply.ports.number)
		return false;
	set_v4(&tuple->src, message->original.src);
	set_v4(&tuple->dst, message->original.dst);
	set_v4(&translation->backend, message->reply.src);
	set_v4(&translation->snat, message->reply.dst);
	copy_ports(tuple, translation, &message->original.ports, &message->reply.ports);
	return true;
}

static __always_inline bool read_v6_message(const struct message_v6 *message, struct tuple *tuple,
					    struct translation *translation)
{
	if (!v6_fits(&message->original, CTA_TUPLE_ORIG) || !v6_fits(&message->reply, CTA_TUPLE_REPLY) ||
	    message->original.ports.number != message->reply.ports.number)
		return false;
	copy_v6(&tuple->src, message->original.src);
	copy_v6(&tuple->dst, message->original.dst);
	copy_v6(&translation->backend, message->reply.src);
	copy_v6(&translation->snat, message->reply.dst);
	copy_ports(tuple, translation, &message->original.ports, &message->reply.ports);
	return true;
}

/* Never by status bits: IPVS sets none. The reply is the inverse of the original unless something was rewritten. */
static __always_inline __u8 nat_of(const struct tuple *tuple, const struct translation *translation)
{
	__u8 nat = 0;

	if (tuple->dst_port != translation->backend_port || !same_address(&tuple->dst, &translation->backend))
		nat |= NAT_DNAT;
	if (tuple->src_port != translation->snat_port || !same_address(&tuple->src, &translation->snat))
		nat |= NAT_SNAT;
	return nat ? nat : NAT_NONE;
}

static __always_inline void remember_zone(__u16 zone)
{
	NO_UNROLL
	for (__u32 i = 0; i < ZONES; i++) {
		__u32 slot = i, *seen = bpf_map_lookup_elem_(ZONES_SEEN, &slot);

		if (!seen || *seen == zone)
			return;
		if (!*seen) {
			*seen = zone;
			return;
		}
	}
}

/* An entry is born. Where the tuple is known already, its entry was deleted, which may not have been told. If its
 * socket is open, it goes on with this one. */
static __always_inline void entry_begins(const struct tuple *tuple, struct translation *translation)
{
	struct translation *earlier;

	translation->created = bpf_ktime_get_boot_ns();
	translation->nat = nat_of(tuple, translation);
	translation->source = SOURCE_CONNTRACK;
	count(COUNT_CONNTRACK_NEW);
	if (!bpf_map_update_elem_(TRANSLATIONS, tuple, translation, BPF_NOEXIST))
		return;
	earlier = bpf_map_lookup_elem_(TRANSLATIONS, tuple);
	if (earlier && earlier->ended == ENDED_UNTOLD && !earlier->conn_id)
		lose_flow();
	if (earlier && earlier->conn_id > CLAIM_OVER && claimant(earlier)) {
		translation->conn_id = earlier->conn_id;
		translation->socket = earlier->socket;
		translation->spot = earlier->spot;
	}
	if (bpf_map_update_elem_(TRANSLATIONS, tuple, translation, BPF_ANY))
		count(COUNT_LOST_TRANSLATION_MAP);
}

/* An entry is gone. `offset` is where the attributes behind the tuples begin. */
static __always_inline void entry_ends(struct __sk_buff *skb, __u32 offset, const struct tuple *tuple,
				       struct translation *ended)
{
	struct translation *known = bpf_map_lookup_elem_(TRANSLATIONS, tuple);
	struct connection *connection;
	bool raced = false;

	count(COUNT_CONNTRACK_DESTROY);
	if (!known || known->ct_id != ended->ct_id)
		goto stale;
	if (known->conn_id <= CLAIM_OVER)
		goto flow;
	connection = claimant(known);
	if (connection)
		goto open;
	DELETE(TRANSLATIONS, tuple);
	return;

open:
	known->ended = ENDED;
	connection->row.keeps = 1;
	count(COUNT_KEPT);	      /* a full barrier */
	connection = claimant(known); /* it may just be growing old, and have been copied before (grow_old) */
	if (connection)
		connection->row.keeps = 1;
	return;
stale: /* The entry was replaced, and this is the end of the old one; or it was never known. */
	if (tuple->protocol == IPPROTO_TCP) {
		count(COUNT_STALE_DESTROY);
		return;
	}
	ended->created = known ? known->created : 0;
	ended->nat = nat_of(tuple, ended);
	ended->source = SOURCE_CONNTRACK;
	known = ended;
	raced = true;
flow:
	flow_ends(skb, offset, tuple, known, raced);
}

static __always_inline void conntrack_event(struct __sk_buff *skb)
{
	struct translation translation = {};
	struct tuple tuple = {};
	struct message_tail *tail;
	__u32 behind_tuples = offsetof(struct message_v4, tail);
	union {
		struct message_head head;
		struct message_v4 v4;
		struct message_v6 v6;
	} message;
	__u8 type;

	/* One load for the usual message; what is shorter has no ports and is looked at only to count it. */
	if (bpf_skb_load_bytes(skb, 0, &message.v4, sizeof(message.v4)) ||
	    (message.head.family == AF_INET && !read_v4(&message.v4, &tuple, &translation))) {
		count_misfit(skb, offsetof(struct message_v4, original.ports.number));
		return;
	}
	tail = &message.v4.tail;
	if (message.head.family != AF_INET) {
		if (bpf_skb_load_bytes(skb, 0, &message.v6, sizeof(message.v6)) ||
		    !read_v6_message(&message.v6, &tuple, &translation)) {
			count_misfit(skb, offsetof(struct message_v6, original.ports.number));
			return;
		}
		tail = &message.v6.tail;
		behind_tuples = offsetof(struct message_v6, tail);
	}
	type = message.head.type & 0xff;
	if (!has_ports(tuple.protocol)) {
		count(COUNT_IGNORED_PROTOCOL);
		return;
	}
	if (tail->first_header == ATTRIBUTE(6, CTA_ZONE)) {
		tuple.zone = translation.zone = bpf_ntohs((__u16)tail->first);
		remember_zone(tuple.zone);
		tail->first_header = tail->second_header;
		tail->first = tail->second;
	}
	if (tail->first_header != ATTRIBUTE(8, CTA_ID)) {
		count(COUNT_MALFORMED_EVENTS);
		return;
	}
	translation.ct_id = bpf_ntohl(tail->first);

	if (type == IPCTNL_MSG_CT_NEW)
		entry_begins(&tuple, &translation);
	else if (type == IPCTNL_MSG_CT_DELETE)
		entry_ends(skb, behind_tuples, &tuple, &translation);
	else
		count(COUNT_MALFORMED_EVENTS);
}

#endif
