/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The one record that leaves the kernel, and the tuple that everything is joined by.
 * tracer/record.py describes the same bytes to NumPy; tests/test_record.py compares every offset. */
#ifndef TRACER_RECORD_H
#define TRACER_RECORD_H

/* Both families are one: an IPv4 address is v4-mapped (::ffff:a.b.c.d), as in RFC 4291, 2.5.5.2. */
struct address {
	union {
		__u8 bytes[16];
		__u32 words[4];
		__u64 halves[2];
	};
};

/* A connection's original tuple, as the client sees it: also the key of the translations map, so every
 * byte counts and `reserved` is zero. Ports are in network order. */
struct tuple {
	struct address src;
	struct address dst;
	__u16 src_port;
	__u16 dst_port;
	__u16 zone;
	__u8 protocol;
	__u8 reserved;
};

enum record_flag {
	FLAG_OPENED = 1 << 0,	   /* the row holds the connection's beginning */
	FLAG_CLOSED = 1 << 1,	   /* the row holds its end */
	FLAG_ESTABLISHED = 1 << 2, /* the handshake was completed */
	FLAG_COUNTED = 1 << 3,	   /* bytes, packets and retransmits are known */
	FLAG_LATENCY = 1 << 4,	   /* connect_latency_us is known and belongs to this row */
	FLAG_PROCESS = 1 << 5,	   /* pid, comm and cgroup_id are those of the caller of connect() */
	FLAG_IPV4 = 1 << 6,	   /* the addresses are v4-mapped */
	FLAG_PROVISIONAL = 1 << 7, /* withdrawn by user space if a socket claims the entry after all (flow.h) */
};

enum role { ROLE_CLIENT, ROLE_FORWARDED, ROLE_SERVER };

/* Bits, so that dnat+snat is their sum. NAT_UNKNOWN is zero: what nobody filled in is unknown. */
enum nat { NAT_UNKNOWN = 0, NAT_NONE = 1, NAT_DNAT = 2, NAT_SNAT = 4 };

enum nat_source { SOURCE_NULL, SOURCE_CONNTRACK, SOURCE_SOCKET, SOURCE_DUMP };

/* `result` is an errno, 0 for a connection that ended well, or one of these. */
enum result { RESULT_OPEN = 0xffff, RESULT_ABORTED = 0xfffe };

/* Times are CLOCK_BOOTTIME in nanoseconds. */
struct record {
	struct tuple tuple;
	struct address backend;
	struct address snat;
	__u64 conn_id;
	__u64 ts;
	__u64 started; /* 0: before the tracer */
	__u64 duration_ns;
	__u64 bytes_sent;
	__u64 bytes_received;
	__u64 packets_sent;
	__u64 packets_received;
	__u64 cgroup_id;
	char comm[16];
	__u32 retransmits;
	__u32 connect_latency_us;
	__u32 rtt_us;
	__u32 pid;
	__u32 netns;
	__u32 ct_id;
	__u16 backend_port;
	__u16 snat_port;
	__u16 ct_zone;
	__u16 result;
	__u8 flags;
	__u8 role;
	__u8 nat;
	__u8 nat_source;
	/* Of rows made from conntrack's DESTROY; 0 in others. tracer/kernel/flows.py makes times and results of them. */
	__u8 ct_state;	/* TCP: enum tcp_conntrack of the last packet (nf_conntrack_tcp.h) */
	__u8 ct_status; /* the low byte of CTA_STATUS */
	__u16 ct_left;	/* seconds the entry had left when it was deleted; 0: it had expired */
};

_Static_assert(sizeof(struct tuple) == 40, "a tuple has 40 bytes, none of them padding");
_Static_assert(sizeof(struct record) == 200, "a record has 200 bytes; tracer/record.py says the same");

#endif
