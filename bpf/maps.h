/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The maps. User space makes them (tracer/kernel/maps.py) and puts their descriptors in the place of NAME_FD (symbols.h),
 * so that sizes are decided by arithmetic at the start and the descriptors outlive the process that compiles.
 * All hash maps are plain and preallocated: an insert that does not fit fails and is counted, nothing is
 * evicted, and no allocation happens in the packet's path. */
#ifndef TRACER_MAPS_H
#define TRACER_MAPS_H

#include "counters.h"
#include "record.h"
#include "symbols.h"

/* What the ring has been told of a connection so far: totals as the socket counts them. */
struct reported {
	__u64 bytes_sent;
	__u64 bytes_received;
	__u32 packets_sent;
	__u32 packets_received;
	__u32 retransmits;
	__u32 spot; /* 1 + its socket's spot, if it has or had a place among the young; 0: none */
};

/* Whether row.tuple.dst is whom the socket talks to. */
enum dialled {
	DIALLED_PEER,	 /* it is */
	DIALLED_ANOTHER, /* it is whom connect() was told: a balancer at the socket changed the destination */
	DIALLED_UNKNOWN, /* it is, but a balancer may have changed it: what connect() was told is not known */
};

/* The next row of a live connection as far as it is known: the fields of `struct record` that only this can tell, and
 * what fits into the space that is left behind them.
 * ts is the end of what was reported so far: the beginning of the next row. */
struct row {
	struct tuple tuple;
	struct address backend;
	struct address snat;
	__u64 conn_id;
	__u64 ts;
	__u64 started;
	__u64 cgroup_id;
	char comm[16];
	__u32 connect_latency_us;
	__u32 pid;
	__u32 netns;
	__u32 ct_id;
	__u16 backend_port;
	__u16 snat_port;
	__u16 ct_zone;
	__u8 flags;
	__u8 role;
	__u8 nat;
	__u8 nat_source;
	__u8 dialled;	 /* enum dialled */
	__u8 keeps;	 /* conntrack dropped the entry under this connection: the translation is kept for it */
	__u16 peer_port; /* with connection.peer */
	__u16 visited;	 /* the number of the iterator's walk that last met the socket (CONTROL_WALK) */
};

/* A live connection: its next row, and what was reported before. With header and key, an element of the map has 256
 * bytes: four cache lines, each of which costs as much as all arithmetic if it is not there when an event comes. */
struct connection {
	struct row row;
	struct reported reported;
	struct address peer; /* whom the socket talks to, if DIALLED_ANOTHER */
};

_Static_assert(sizeof(struct connection) == 200, "a connection has 200 bytes; tracer/kernel/maps.py says the same");

/* A place for a connection that has not had an interim row: found by its socket's address, without a call and without a
 * lock. What finds its place taken goes to the connections map. A ticket is taken by whoever wants the place; it is his
 * who then sees his own alone, so of two at once none may get it. That nobody sees a place taken before he sees it left
 * needs a machine that keeps the order of stores (x86); elsewhere, and where few connections are asked for, there is one
 * place, which is taken (tracer/kernel/maps.py).
 */
struct young {
	__u64 tickets;
	__u64 socket; /* 0: free, or not filled yet */
	struct connection connection;
	__u64 reserved[5];
};

_Static_assert(sizeof(struct young) == 256, "a young connection has 256 bytes; tracer/kernel/maps.py says the same");

/* How conntrack rewrote an original tuple: the reply tuple, read as an answer. What the usual end of an entry needs
 * comes first: behind header and key, it is in the same cache line as the key's end. */
struct translation {
	__u32 ct_id;
	__u16 zone;
	__u8 nat;      /* enum nat */
	__u8 source;   /* enum nat_source: CONNTRACK or DUMP */
	__u64 conn_id; /* the connection that claimed it last; 0: no socket of this kernel has; or enum claim */
	__u64 socket;  /* that connection's socket, to ask whether it is still open */
	__u64 created; /* CLOCK_BOOTTIME ns: when the entry was inserted here */
	__u8 ended;    /* enum ended */
	__u8 reserved;
	__u16 spot; /* that connection's reported.spot */
	__u16 backend_port;
	__u16 snat_port;
	struct address backend; /* reply source: where the connection really goes */
	struct address snat;	/* reply destination: as whom it goes there */
};

/* Whether conntrack has dropped the entry, and the translation is kept for a socket, which removes it. */
enum ended {
	ENDED = 1,
	ENDED_UNTOLD, /* and its provisional row found the ring full: a loss, unless a socket claims it (flow.h) */
};

/* Claims that are no connection's id: those have a run id in their upper bits. */
enum claim {
	CLAIM_DATAGRAM = 1, /* a connected UDP socket's: `owners` says whose */
	CLAIM_LOST = 2,	    /* a TCP socket's that found no room and was counted */
	CLAIM_OVER = 3,	    /* over before the tracer began (written by user space) */
};

/* The process behind a connected UDP socket. */
struct owner {
	__u64 cgroup_id;
	char comm[16];
	__u32 pid; /* 0: not known, the socket was only met by the iterator */
	__u32 netns;
	struct address dialled; /* what connect() was told, if `rewritten` */
	__u16 dialled_port;
	__u8 rewritten; /* a balancer at the socket changed the destination */
	__u8 undialled; /* one may have: what connect() was told is not known */
	__u8 released;	/* the socket is closed: the entry goes with the translation */
	__u8 reserved[3];
};

/* What a thread that is inside connect() gave to it. */
struct dial {
	struct address dst;
	__u64 sk;
	__u64 began; /* CLOCK_BOOTTIME ns */
	__u16 port;  /* network order */
	__u16 protocol;
	__u8 fresh; /* the socket was neither connected nor connecting */
	__u8 sent;  /* it went to SYN_SENT: its row is the connection's business */
	__u8 reserved[2];
};

/* The key of a longest-prefix-match map; IPv4 networks are v4-mapped, their length plus 96. */
struct network {
	__u32 length;
	__u32 address[4];
};

/* young: slot -> struct young. Array, mapped into user space, which frees what a sweep finds (tracer/kernel/maps.py). */
#define YOUNG MAP(YOUNG_FD)

/* spilled: 0 -> u32 by spot (connection.h): how many sockets of that spot are in the connections map, at most. Array of
 * one. Where it says none, nobody looks there. So many spots that this is the rule with thousands of connections. */
#define SPILLED MAP(SPILLED_FD)
#define SPOT_BITS 14

/* connections: socket pointer -> struct connection. Hash. Inserted at SYN_SENT, for what finds its place among the young
 * taken, and by the iterator: what leaves them, and sockets older than the tracer; deleted at CLOSE, which every TCP socket passes before it is freed (tcp_done,
 * tcp_disconnect), or else when the socket is destroyed. If the kernel showed neither (tracer.c), the iterator's
 * sweep removes it, and an entry is used only for the socket whose ports it has. Read by the iterator. Full:
 * COUNT_LOST_CONNECTION_MAP. */
#define CONNECTIONS MAP(CONNECTIONS_FD)

/* translations: struct tuple -> struct translation. Hash. Inserted at conntrack's NEW and by the dump at the start
 * (tracer/kernel/conntrack.py); deleted at DESTROY and by the reconciliation with a dump, for entries whose DESTROY
 * is not sent (born before anybody listened). Not deleted when a socket claims it: conntrack reuses an entry in
 * TIME_WAIT for a new connection without a NEW event. Kept beyond DESTROY, `ended`, in two cases, until the socket or
 * the reconciliation removes it. A TCP entry that no socket claimed, that is not assured and younger than KEEP_NS:
 * conntrack drops an entry as soon as the peer answers the first SYN with a RST, before the socket hears of it. And
 * one whose socket is still open: somebody deleted it (conntrack -D), and the socket's next packet makes a new entry,
 * which inherits the claim. Full: COUNT_LOST_TRANSLATION_MAP. */
#define TRANSLATIONS MAP(TRANSLATIONS_FD)

/* zones: 0..ZONES-1 -> u32 zone, 0 where unused. Array. Zones other than 0 in which an entry was seen; written
 * by the event filter, never cleared (a node has a handful). Full: tuples of further zones join as unknown. */
#define ZONES_SEEN MAP(ZONES_FD)
#define ZONES 8

/* records: ring buffer of struct record. Filled below, drained by tracer/kernel/ring.py.
 * Full: COUNT_LOST_RING for closing rows; interim rows wait (COUNT_DEFERRED). */
#define RECORDS ((void *)MAP(RECORDS_FD))

/* tallies: 0 -> struct tally. Per-CPU array, never reset. */
#define TALLIES MAP(TALLIES_FD)

/* In one element, and what each connection counts first in it: one cache line. */
struct tally {
	__u64 sequence; /* how many connection ids were given out on this CPU */
	__u64 counters[COUNTERS];
};

/* owners: struct tuple (zone 0) -> struct owner. Hash. Inserted when a connected UDP socket whose tuple has a
 * translation is closed or met by the iterator, or when one is closed whose translation may still come, and at its
 * connect() where the connect probe runs; deleted with the translation once the socket is closed, or by the
 * reconciliation if there never was one. Full: COUNT_LOST_OWNER_MAP. */
#define OWNERS MAP(OWNERS_FD)

/* dials: thread (pid_tgid) -> struct dial. Hash. From a connect()'s entry to its exit. Full: COUNT_LOST_DIAL_MAP. */
#define DIALS MAP(DIALS_FD)

/* roomless: socket pointer -> u8. Hash. Sockets that found the connection map full and were counted, until they
 * close: a place that becomes free meanwhile is not theirs, else one connection were both counted as lost and a row.
 * Full: of further ones that may be so, which `late_begin` tells. */
#define ROOMLESS MAP(ROOMLESS_FD)

/* excluded: struct network -> u8. Longest prefix match, written by user space before the programs are attached:
 * connections to these destinations are not offered where the value is not 0. Looked at if EXCLUDE_CIDRS. */
#define EXCLUDED MAP(EXCLUDED_FD)

/* untracked: struct network -> u32. Longest prefix match, written by user space: the subnets of bridges without bridge
 * netfilter, each with its bridge's number. What stays on one bridge passes no hook. */
#define UNTRACKED MAP(UNTRACKED_FD)

/* control: enum control -> u64. Array, written by user space. */
#define CONTROL MAP(CONTROL_FD)
enum control {
	CONTROL_MODE, /* enum mode: what the socket iterator does */
	CONTROL_PAUSE, /* when the tracer began to stop (CLOCK_BOOTTIME ns), or 0: later connections are counted, not traced */
	CONTROL_WALK,  /* the number of the socket iterator's walk */
	CONTROL_DUE,   /* when the intervals began, at the latest, that are over (CLOCK_BOOTTIME ns) */
	CONTROL_DIALS, /* enum dials: whether somebody rewrites destinations at the socket, and whether we see it */
	/* What was compiled in, for whoever compares the maps with the kernel's tables (tracer/kernel/witness.py): */
	CONTROL_NODE_NETNS,
	CONTROL_NETNS_FILTER,
	CONTROL_TRACED,	 /* enum traced */
	CONTROL_CROWDED, /* enum crowded; written by the programs */
	CONTROLS
};
enum crowded {
	CROWDED = 1,	       /* the connection map was full once: `roomless` may hold something */
	CROWDED_NOT_ALL_KNOWN, /* so was `roomless`: a second look (tracer.c) takes no beginnings any more */
};
enum traced {
	TRACED_LOOPBACK = 1, /* INCLUDE_LOOPBACK */
	TRACED_SERVERS = 2,  /* role server */
};
enum dials {
	DIALS_ARE_PEERS, /* nobody rewrites them, and the connect probe is off */
	DIALS_SEEN,	 /* the connect probe is on */
	DIALS_UNSEEN,	 /* somebody does, and the connect probe is off */
};
enum mode {
	MODE_ADOPT,  /* take in sockets that are older than the tracer */
	MODE_REPORT, /* emit a row for every connection whose interval began when CONTROL_DUE says, or before */
};

/* listeners: netns << 16 | port -> u8. Hash. Filled by the iterator in MODE_ADOPT, which walks listening sockets
 * before the others: a socket with a listener on its local port was accepted. Full: such a socket is taken for
 * a dialled one, unless conntrack tells; COUNT_LOST_LISTENER_MAP. */
#define LISTENERS MAP(LISTENERS_FD)

/* netns_filter: inode number -> u8. Hash, written by user space before the programs are attached, if
 * NETNS_FILTER is not 0: 1, only the listed namespaces; 2, all but the listed. */
#define NETNS_LIST MAP(NETNS_LIST_FD)

static __always_inline struct tally *tally(void)
{
	__u32 slot = 0;

	return bpf_map_lookup_elem_(TALLIES, &slot);
}

static __always_inline void count_in(struct tally *mine, __u32 which)
{
	/* Atomic although per-CPU: a softirq may interrupt a program in process context and count as well. */
	__sync_fetch_and_add(&mine->counters[which], 1);
}

static __always_inline void count(__u32 which)
{
	struct tally *mine = tally();

	if (mine)
		count_in(mine, which);
}

static __always_inline __u64 control(__u32 which)
{
	__u64 *value = bpf_map_lookup_elem_(CONTROL, &which);

	return value ? *value : 0;
}

#endif
