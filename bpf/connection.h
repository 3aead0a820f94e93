/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* The life of one TCP connection of a local socket, from SYN_SENT to CLOSE, and its rows. */
#ifndef TRACER_CONNECTION_H
#define TRACER_CONNECTION_H

#include "kernel.h"

static __always_inline bool wanted_netns(__u32 netns)
{
#if NETNS_FILTER == 0
	return true;
#else
	bool listed = bpf_map_lookup_elem_(NETNS_LIST, &netns) != NULL;

	return NETNS_FILTER == 1 ? listed : !listed;
#endif
}

/* The key that asks a longest-prefix-match map for an address. */
static __always_inline void host_network(struct network *network, const struct address *address)
{
	network->length = 128;
	for (int i = 0; i < 4; i++)
		network->address[i] = address->words[i];
}

/* Whether a destination is left out by --exclude-cidr. */
static __always_inline bool excluded_destination(const struct address *dst)
{
#if EXCLUDE_CIDRS
	struct network network;
	__u8 *excluded;

	host_network(&network, dst);
	excluded = bpf_map_lookup_elem_(EXCLUDED, &network);
	return excluded && *excluded;
#else
	return false;
#endif
}

/* Unique for this agent run, and in practice across runs: run (16 bits), CPU (12), sequence (36). A program may be
 * interrupted by another on its CPU between any two lines; a round in which the slot moved by more than its own step
 * is given up, so a value is only ever taken by the round that made it. */
static __always_inline __u64 conn_id_of(struct tally *mine)
{
	__u64 before = 0, after = 0, *sequence = &mine->sequence;

	NO_UNROLL
	for (int round = 0; round < 4; round++) {
		before = *(volatile __u64 *)sequence;
		__sync_fetch_and_add(sequence, 1);
		after = *(volatile __u64 *)sequence;
		if (after == before + 1)
			break;
	}
	return RUN_ID << 48 | (__u64)(bpf_get_smp_processor_id() & 0xfff) << 36 | (after & ((1ULL << 36) - 1));
}

static __always_inline __u64 next_conn_id(void)
{
	struct tally *mine = tally();

	return mine ? conn_id_of(mine) : 0; /* it cannot be missing: the array has that slot */
}

/* The translation of a tuple in another zone than 0, if exactly one matches; `key->zone` says which. */
static __always_inline struct translation *find_in_zones(struct tuple *key)
{
	struct translation *found = NULL;
	__u16 zone_found = 0;
	int matches = 0;

	NO_UNROLL
	for (__u32 i = 0; i < ZONES; i++) {
		__u32 slot = i, *zone = bpf_map_lookup_elem_(ZONES_SEEN, &slot);
		struct translation *in_zone;

		if (!zone || !*zone)
			break; /* slots are filled in order: no further zone was seen */
		key->zone = *zone;
		in_zone = bpf_map_lookup_elem_(TRANSLATIONS, key);
		if (in_zone) {
			found = in_zone;
			zone_found = key->zone;
			matches++;
		}
	}
	key->zone = zone_found;
	if (matches > 1) {
		count(COUNT_AMBIGUOUS);
		return NULL;
	}
	return found;
}

/* The node's translation of a tuple: zone 0 first, else another. */
static __always_inline struct translation *find_translation(struct tuple *key)
{
	struct translation *found = bpf_map_lookup_elem_(TRANSLATIONS, key);

	return found ? found : find_in_zones(key);
}

static __always_inline struct young *place_of(__u32 spot)
{
	__u32 slot = spot * YOUNG_SLOTS >> SPOT_BITS;

	return bpf_map_lookup_elem_(YOUNG, &slot);
}

/* The place of a socket among the young, and its spot; for programs that the kernel tells what a socket is. `sk` must come
 * from where no helper was given its address: to the verifier of 6.5 to 6.14 it would be a number afterwards. */
static __always_inline struct young *find_place(const void *sk, __u32 *spot)
{
	__u32 first = 0;
	__u64 socket = (__u64)sk;
	struct young *young = bpf_map_lookup_elem_(YOUNG, &first);

	if (!young)
		return NULL; /* cannot be: there is one place at least */
	/* Nobody may calculate with an address, but the difference of two is a number. */
	asm volatile("%0 -= %1" : "+r"(socket) : "r"(young));
	*spot = socket * 0x9e3779b97f4a7c15ULL >> (64 - SPOT_BITS); /* Fibonacci hashing (Knuth 6.4) */
	return place_of(*spot);
}

static __always_inline __u32 *spilled(__u32 spot)
{
	__u32 first = 0, *counts = bpf_map_lookup_elem_(SPILLED, &first);

	/* What clang knows of it the verifier may not, if it has been in memory since (before 5.11 or so). */
	asm volatile("" : "+r"(spot));
	return counts ? &counts[spot & ((1 << SPOT_BITS) - 1)] : NULL;
}

static __always_inline bool may_have_spilled(__u32 spot)
{
	__u32 *count = spilled(spot);

	return !count || *count;
}

static __always_inline void spill(__u32 spot, int more)
{
	__u32 *count = spilled(spot);

	if (count)
		__sync_fetch_and_add(count, more);
}

/* The connection of a socket. */
static __always_inline struct connection *find_connection(const void *sk)
{
	__u64 socket = (__u64)sk;
	__u32 spot;
	struct young *young = find_place(sk, &spot);

	if (!young)
		return NULL;
	if (young->socket == (__u64)sk)
		return &young->connection;
	if (!may_have_spilled(spot))
		return NULL;
	return bpf_map_lookup_elem_(CONNECTIONS, &socket);
}

static __always_inline void leave(struct young *young)
{
	*(volatile __u64 *)&young->socket = 0;
	__sync_fetch_and_add(&young->tickets, -1);
}

/* Whether it was in the map. */
static __always_inline bool remove_old(const void *sk, __u32 spot)
{
	__u64 socket = (__u64)sk;

	if (DELETE(CONNECTIONS, &socket))
		return false;
	spill(spot, -1);
	return true;
}

static __always_inline void remove_connection(const void *sk)
{
	__u32 spot;
	struct young *young = find_place(sk, &spot);

	if (!young)
		return;
	if (young->socket == (__u64)sk)
		leave(young);
	else
		remove_old(sk, spot);
}

/* The connection that claimed a translation last, if its socket is still open. */
static __always_inline struct connection *claimant(const struct translation *translation)
{
	__u64 socket = translation->socket;
	__u32 spot = translation->spot - 1;
	struct connection *connection;
	struct young *young;

	if (translation->spot) {
		young = place_of(spot);
		if (!young)
			return NULL;
		if (*(volatile __u64 *)&young->socket == socket)
			return young->connection.row.conn_id == translation->conn_id ? &young->connection : NULL;
		if (!may_have_spilled(spot))
			return NULL;
	}
	connection = bpf_map_lookup_elem_(CONNECTIONS, &socket);
	return connection && connection->row.conn_id == translation->conn_id ? connection : NULL;
}

/* Whether one tuple is open in two namespaces, so that whose the entry is cannot be told: another socket has claimed
 * this translation and is still open, or has done so while this one stood without (`again`). */
static __always_inline bool claimed_by_another(const void *sk, const struct translation *translation,
					       const struct row *row, bool again)
{
	if (!translation->conn_id || translation->conn_id == row->conn_id)
		return false;
	if (again && row->flags & FLAG_ESTABLISHED)
		return true;
	return translation->socket != (__u64)sk && claimant(translation);
}

/* Whether a translation is an earlier connection's, and nothing says that this one is its heir. conntrack may take an
 * entry in TIME_WAIT for a new connection without a NEW event; but where the socket's own namespace can redirect what
 * it sends (a sidecar), the connection may never have come out. */
static __always_inline bool is_left_over(const void *sk, const struct row *row, const struct translation *translation)
{
	return translation->conn_id && translation->conn_id != row->conn_id && translation->created < row->started &&
	       row->netns != NODE_NETNS && is_hooked(sk, &row->tuple);
}

/* Whether both addresses are on one bridge without bridge netfilter: then no hook was on the path. */
static __always_inline bool bridged(const struct tuple *tuple)
{
	struct network network;
	__u32 *there, *here;

	host_network(&network, &tuple->dst);
	there = bpf_map_lookup_elem_(UNTRACKED, &network);
	if (!there)
		return false;
	host_network(&network, &tuple->src);
	here = bpf_map_lookup_elem_(UNTRACKED, &network);
	return here && *here == *there;
}

/* By which tuple conntrack knows a connection: whom it talks to, not what connect() was told. */
static __always_inline void key_of(const struct connection *connection, struct tuple *key)
{
	*key = connection->row.tuple;
	if (connection->row.dialled == DIALLED_ANOTHER) {
		key->dst = connection->peer;
		key->dst_port = connection->row.peer_port;
	}
}

static __always_inline void not_rewritten(struct row *row)
{
	row->nat = NAT_NONE;
	row->backend = row->tuple.dst;
	row->backend_port = row->tuple.dst_port;
}

/* Fills an accepted connection's translation. A socket that accepted is where the connection went; whether its client
 * dialled another address is known only where conntrack has an entry for just these two ends. */
static __always_inline void join_server(struct row *row)
{
	struct tuple key = row->tuple;
	struct translation *translation = find_translation(&key);

	row->backend = row->tuple.dst;
	row->backend_port = row->tuple.dst_port;
	if (translation && translation->nat == NAT_NONE) {
		row->nat = NAT_NONE;
		row->ct_id = translation->ct_id;
		row->ct_zone = translation->zone;
		row->nat_source = translation->source;
	}
}

static __always_inline bool is_server(const struct row *row)
{
	return ROLES & 1 << ROLE_SERVER && row->role == ROLE_SERVER;
}

/* Fills the row's translation, if it is known. Asked once the connection stands and, if that found nothing,
 * again at each row. */
static __always_inline void join(const void *sk, struct connection *connection, bool again)
{
	struct row *row = &connection->row;
	struct translation *translation;
	struct tuple key;

	if (is_server(row)) {
		join_server(row);
		return;
	}
	/* What another namespace sends to itself never leaves it; the node's own may carry the same tuple. */
	if (row->netns != NODE_NETNS &&
	    (is_loopback(&row->tuple.src) || same_address(&row->tuple.src, &row->tuple.dst)))
		goto inside;
	key_of(connection, &key);
	translation = bpf_map_lookup_elem_(TRANSLATIONS, &key);
	if (!translation)
		goto in_no_zone_0;
found:
	if (translation->conn_id)
		goto claimed;
claim:
	translation->spot = connection->reported.spot;
	translation->socket = (__u64)sk;
	BARRIER(); /* who sees the claim sees whose it is */
	translation->conn_id = row->conn_id;
	if (row->dialled != DIALLED_PEER)
		goto not_the_peer;
	row->nat = translation->nat;
	row->nat_source = translation->source;
take:
	row->backend = translation->backend;
	row->backend_port = translation->backend_port;
	row->snat = translation->snat;
	row->snat_port = translation->snat_port;
	row->ct_id = translation->ct_id;
	row->ct_zone = translation->zone;
out:
	if (translation->ended)
		row->keeps = 1;
	return;

claimed:
	if (claimed_by_another(sk, translation, row, again)) {
		count(COUNT_AMBIGUOUS);
		goto unknown;
	}
	if (is_left_over(sk, row, translation))
		goto unknown;
	goto claim;
not_the_peer:
	if (row->dialled == DIALLED_ANOTHER) {
		row->nat = NAT_DNAT | (translation->nat & NAT_SNAT);
		row->nat_source = SOURCE_SOCKET;
		goto take;
	}
	/* What connect() was told may be something else than what conntrack saw. */
	if (!(translation->nat & NAT_DNAT))
		goto out;
	row->nat = translation->nat;
	row->nat_source = translation->source;
	goto take;
in_no_zone_0:
	translation = find_in_zones(&key);
	if (translation)
		goto found;
	if (!bridged(&key) || row->dialled != DIALLED_PEER || is_hooked(sk, &key))
		goto unknown;
	not_rewritten(row);
	return;
inside:
	if (row->dialled == DIALLED_PEER && !is_hooked(sk, &row->tuple))
		not_rewritten(row);
	return;
unknown: /* unless the socket told, and the row says so: no loss */
	if (row->dialled == DIALLED_ANOTHER) {
		row->nat = NAT_DNAT;
		row->nat_source = SOURCE_SOCKET;
		row->backend = connection->peer;
		row->backend_port = row->peer_port;
	}
}

/* Turns a socket's own view into its client's. */
static __always_inline void turn(struct tuple *tuple)
{
	struct address address = tuple->src;
	__u16 port = tuple->src_port;

	tuple->src = tuple->dst;
	tuple->src_port = tuple->dst_port;
	tuple->dst = address;
	tuple->dst_port = port;
}

/* What is known of a socket when its entry is made. False: it is not traced, by option. */
static __always_inline bool describe(const void *sk, struct row *row, enum role role)
{
	if (!read_tuple(sk, &row->tuple, IPPROTO_TCP))
		return false;
	row->netns = read_netns(sk);
	if (!wanted_netns(row->netns))
		return false;
	row->role = role;
	if (role == ROLE_SERVER)
		turn(&row->tuple);
#if !INCLUDE_LOOPBACK
	/* In the node's namespace a loopback destination may be a NodePort: decided when it stands. */
	if (is_loopback(&row->tuple.dst) && row->netns != NODE_NETNS)
		return false;
#endif
	if (is_v4(&row->tuple.dst))
		row->flags = FLAG_IPV4;
	return true;
}

/* Whether an entry is this socket's. It is not where the end of an earlier socket at this address was missed. */
static __always_inline bool is_entry_of(const void *socket, const void *sk, const struct connection *connection)
{
	const struct tuple *tuple = &connection->row.tuple;
	bool server = is_server(&connection->row);
	__u16 port;

	READ(port, socket, OFFSET_sock_common__skc_dport);
	if (port != (server					  ? tuple->src_port
		     : connection->row.dialled == DIALLED_ANOTHER ? connection->row.peer_port
								  : tuple->dst_port))
		return false;
	if (!tuple->src_port)
		return true; /* not known yet */
	READ(port, sk, OFFSET_inet_sock__inet_sport);
	return port == (server ? tuple->dst_port : tuple->src_port);
}

/* What `dialled` is of a connection whose connect() was not seen. */
static __always_inline __u8 unless_told(void)
{
	return control(CONTROL_DIALS) == DIALS_ARE_PEERS ? DIALLED_PEER : DIALLED_UNKNOWN;
}

/* What connect() was told, where that may be another address than the socket's peer. */
static __always_inline void learn_dial(struct connection *connection)
{
	struct row *row = &connection->row;
	__u64 thread, dials = control(CONTROL_DIALS);
	struct dial *dial;

	if (dials == DIALS_ARE_PEERS)
		return;
	thread = bpf_get_current_pid_tgid();
	dial = dials == DIALS_SEEN ? bpf_map_lookup_elem_(DIALS, &thread) : NULL;
	if (!dial) {
		connection->row.dialled = DIALLED_UNKNOWN;
		return;
	}
	dial->sent = 1;
	if (is_any(&dial->dst) || (dial->port == row->tuple.dst_port && same_address(&dial->dst, &row->tuple.dst)))
		return;
	row->dialled = DIALLED_ANOTHER;
	connection->peer = row->tuple.dst;
	connection->row.peer_port = row->tuple.dst_port;
	row->tuple.dst = dial->dst;
	row->tuple.dst_port = dial->port;
}

static __always_inline void set_process(struct row *row, const struct process *process)
{
	row->flags |= FLAG_PROCESS;
	row->pid = process->pid;
	row->cgroup_id = process->cgroup_id;
	__builtin_memcpy(row->comm, process->comm, sizeof(row->comm));
}

static __always_inline long insert_with_the_old(const void *sk, __u32 spot, struct connection *connection)
{
	__u64 socket = (__u64)sk;
	long error;

	/* Before, so that it is never too few. */
	spill(spot, 1);
	error = bpf_map_update_elem_(CONNECTIONS, &socket, connection, BPF_NOEXIST);
	if (!error)
		return 0;
	if (error == -EEXIST) { /* perhaps gone by the next line: one too many is better than one too few */
		count(COUNT_LOST_END);
		return bpf_map_update_elem_(CONNECTIONS, &socket, connection, BPF_ANY);
	}
	spill(spot, -1);
	return error;
}

static __always_inline long insert(const void *sk, struct connection *connection)
{
	__u64 socket = (__u64)sk;
	__u32 spot;
	struct young *young = find_place(sk, &spot);

	if (!young)
		return -1;
	if (young->tickets)
		goto taken;
	__sync_fetch_and_add(&young->tickets, 1);
	if (*(volatile __u64 *)&young->tickets != 1)
		goto two_at_once;
	if (may_have_spilled(spot))
		goto perhaps_twice;
fill:
	connection->reported.spot = spot + 1;
	young->connection = *connection;
	BARRIER();
	*(volatile __u64 *)&young->socket = (__u64)sk;
	return 0;

perhaps_twice: /* an earlier socket's at this address, whose end was missed */
	if (bpf_map_lookup_elem_(CONNECTIONS, &socket) && remove_old(sk, spot))
		count(COUNT_LOST_END);
	goto fill;
two_at_once:
	__sync_fetch_and_add(&young->tickets, -1);
taken:
	if (young->socket != (__u64)sk)
		return insert_with_the_old(sk, spot, connection);
	count(COUNT_LOST_END);
	goto fill;
}

/* One that is old already. -EEXIST: before 5.15, its tracepoint may run meanwhile and find it, or not; see
 * connection_began. */
static __always_inline long insert_old(const void *sk, struct connection *connection)
{
	__u32 spot;
	struct young *young = find_place(sk, &spot);
	long error;

	if (!young)
		return -1;
	error = insert_with_the_old(sk, spot, connection);
	if (!error && *(volatile __u64 *)&young->socket == (__u64)sk && remove_old(sk, spot))
		return -EEXIST;
	return error;
}

/* A connection that stays makes room for shorter ones. Where the map is full it stays where it is. Not one that is about
 * to stand: before 5.15 nothing keeps its tracepoint from holding its place meanwhile. */
static __always_inline void grow_old(const void *sk, __u8 state)
{
	__u64 socket = (__u64)sk;
	__u32 spot;
	struct young *young = find_place(sk, &spot);
	struct connection *old;

	if (state == BPF_TCP_SYN_SENT || !young || young->socket != (__u64)sk)
		return;
	spill(spot, 1);
	if (bpf_map_update_elem_(CONNECTIONS, &socket, &young->connection, BPF_NOEXIST)) {
		spill(spot, -1);
		return;
	}
	*(volatile __u64 *)&young->socket = 0;
	FULL_BARRIER(young->tickets);
	/* Its entry in conntrack may have ended just now, and who told the place so has not looked behind it (entry_ends). */
	old = bpf_map_lookup_elem_(CONNECTIONS, &socket);
	if (old && *(volatile __u8 *)&young->connection.row.keeps)
		old->row.keeps = 1;
	__sync_fetch_and_add(&young->tickets, -1);
}

/* A connection found no room: it is lost now, whatever becomes free before it ends. */
static __always_inline void crowd_out(const void *sk)
{
	__u32 slot = CONTROL_CROWDED;
	__u64 *crowded = bpf_map_lookup_elem_(CONTROL, &slot), found, key = (__u64)sk;
	__u8 one = 1;

	count(COUNT_LOST_CONNECTION_MAP);
	found = bpf_map_update_elem_(ROOMLESS, &key, &one, BPF_ANY) ? CROWDED_NOT_ALL_KNOWN : CROWDED;
	if (crowded && *crowded < found)
		*crowded = found;
}

static __always_inline bool is_crowded_out(__u64 *key)
{
	return control(CONTROL_CROWDED) && bpf_map_lookup_elem_(ROOMLESS, key);
}

/* A socket without an entry is closed. */
static __always_inline void forget_crowded_out(__u64 *key)
{
	if (control(CONTROL_CROWDED))
		DELETE(ROOMLESS, key);
}

/* CLOSE -> SYN_SENT, in the context of the caller of connect(). */
static __always_inline void connection_begins(const void *socket)
{
	const void *sk = tcp_socket(socket);
	struct connection connection = {};
	struct row *row = &connection.row;
	struct tally *mine = tally();
	struct process process;
	__u32 sent_before;

	if (!sk || !mine || !describe(socket, row, ROLE_CLIENT))
		return; /* filtered by option: not offered */
	if (control(CONTROL_PAUSE)) {
		count(COUNT_AFTER_PAUSE);
		return;
	}
	learn_dial(&connection);
	if (excluded_destination(&row->tuple.dst))
		return;
	count_in(mine, COUNT_OPENED);
	if (row->dialled == DIALLED_UNKNOWN)
		count_in(mine, COUNT_UNDIALLED);
	row->conn_id = conn_id_of(mine);
	row->started = row->ts = bpf_ktime_get_boot_ns();
	row->flags |= FLAG_OPENED | FLAG_COUNTED;
	read_process(&process);
	set_process(row, &process);
	/* A socket that failed to connect may try again, and goes on counting. */
	READ(sent_before, sk, OFFSET_tcp_sock__segs_out);
	if (sent_before)
		read_totals(sk, &connection.reported);
	if (insert(sk, &connection))
		crowd_out(sk);
}

/* A connection that has no entry: its beginning was missed (tracer.c), or found the map full. Nothing of it has been
 * reported. When it began and whose process dialled are not known. */
static __always_inline struct connection *connection_began(const void *sk, __u64 *key)
{
	struct connection connection = {};
	struct row *row = &connection.row;
	struct translation *translation;
	bool known = is_crowded_out(key);
	struct young *young;
	__u32 spot;

	if (control(CONTROL_PAUSE) || !describe(sk, row, ROLE_CLIENT) || excluded_destination(&row->tuple.dst))
		return NULL; /* not offered, or counted when it began */
	row->ts = bpf_ktime_get_boot_ns();
	row->flags |= FLAG_OPENED | FLAG_COUNTED;
	row->conn_id = next_conn_id();
	row->dialled = unless_told();
	if (!known && !insert(sk, &connection)) {
		count(COUNT_LATE_BEGIN);
		/* Before 5.15 the iterator may have adopted it just now: one of the two sees the other. */
		young = find_place(sk, &spot);
		if (young && young->socket == *key && remove_old(sk, spot))
			count(COUNT_LOST_END);
		return find_connection(sk);
	}
	if (!known) { /* the map is full, and its beginning was missed */
		count(COUNT_LATE_BEGIN);
		crowd_out(sk);
	}
	/* It must not look like a client of another node (flow.h). */
	READ(row->tuple.src_port, sk, OFFSET_inet_sock__inet_sport);
	translation = find_translation(&row->tuple);
	if (translation && !translation->conn_id)
		translation->conn_id = CLAIM_LOST;
	return NULL;
}

/* SYN_RECV -> ESTABLISHED: a local socket accepts. In the context of the packet, so nobody's process. */
static __always_inline void connection_accepted(const void *socket)
{
	const void *sk = tcp_socket(socket);
	struct connection connection = {};
	struct row *row = &connection.row;

	if (!sk || control(CONTROL_PAUSE) || !describe(sk, row, ROLE_SERVER) || excluded_destination(&row->tuple.dst))
		return; /* filtered by option: not offered */
	count(COUNT_ACCEPTED);
	row->conn_id = next_conn_id();
	row->started = row->ts = bpf_ktime_get_boot_ns();
	row->flags |= FLAG_OPENED | FLAG_COUNTED | FLAG_ESTABLISHED;
	join_server(row);
	if (insert(sk, &connection))
		crowd_out(sk);
}

/* Whether it is a loopback connection that nobody rewrote, which are left out by default. */
static __always_inline bool excluded_loopback(const struct row *row)
{
	return !INCLUDE_LOOPBACK && is_loopback(&row->tuple.dst) && !(row->nat & (NAT_DNAT | NAT_SNAT));
}

/* Whether an option leaves a row out: a role not asked for, or --only-virtual and known to be no virtual address. */
static __always_inline bool unwanted(const struct row *row)
{
	if (!(ROLES & 1 << (is_server(row) ? ROLE_SERVER : ROLE_CLIENT)))
		return true;
	return ONLY_VIRTUAL && row->nat != NAT_UNKNOWN && !(row->nat & NAT_DNAT);
}

/* The source port, of a connection that has not stood so far, or of which that was missed. */
static __always_inline void learn_port(const void *sk, struct row *row)
{
	if (!row->tuple.src_port)
		READ(row->tuple.src_port, sk, OFFSET_inet_sock__inet_sport);
}

/* What a record has from the row; everything else is the caller's. */
static __always_inline void write_row(struct record *record, const struct row *row)
{
	record->tuple = row->tuple;
	record->backend = row->backend;
	record->snat = row->snat;
	record->conn_id = row->conn_id;
	record->started = row->started;
	record->cgroup_id = row->cgroup_id;
	__builtin_memcpy(record->comm, row->comm, sizeof(record->comm));
	record->connect_latency_us = row->connect_latency_us;
	record->pid = row->pid;
	record->netns = row->netns;
	record->ct_id = row->ct_id;
	record->backend_port = row->backend_port;
	record->snat_port = row->snat_port;
	record->ct_zone = row->ct_zone;
	record->flags = row->flags;
	record->role = row->role;
	record->nat = row->nat;
	record->nat_source = row->nat_source;
}

/* One row: what is known, and what was added since the last one. False if the ring is full; then nothing of the
 * connection has changed and the next row carries it all. */
static __always_inline bool emit(const void *sk, struct connection *connection, __u64 now, __u16 result, __u8 flags)
{
	struct reported totals = {}, *reported = &connection->reported;
	struct row *row = &connection->row;
	struct record *record;
	bool server = is_server(row);
	__u64 sent, received;
	__u32 rtt, packets_sent, packets_received;

	record = bpf_ringbuf_reserve(RECORDS, sizeof(*record), 0);
	if (!record)
		return false;
	read_totals(sk, &totals);
	totals.spot = reported->spot;
	/* What is sent again is counted before it is sent, so a total may fall back: no row holds less than none. */
	if (totals.bytes_sent < reported->bytes_sent)
		totals.bytes_sent = reported->bytes_sent;
	if (totals.bytes_received < reported->bytes_received)
		totals.bytes_received = reported->bytes_received;
	READ(rtt, sk, OFFSET_tcp_sock__srtt_us);
	write_row(record, row);
	record->ts = now;
	record->duration_ns = now - row->ts;
	sent = totals.bytes_sent - reported->bytes_sent;
	received = totals.bytes_received - reported->bytes_received;
	packets_sent = (__u32)(totals.packets_sent - reported->packets_sent);
	packets_received = (__u32)(totals.packets_received - reported->packets_received);
	/* Sent is from client to server, whoever says so. */
	record->bytes_sent = server ? received : sent;
	record->bytes_received = server ? sent : received;
	record->packets_sent = server ? packets_received : packets_sent;
	record->packets_received = server ? packets_sent : packets_received;
	record->retransmits = totals.retransmits - reported->retransmits;
	record->rtt_us = rtt >> 3; /* srtt_us is kept in eighths (tcp_input.c, tcp_rtt_estimator) */
	record->result = result;
	record->flags |= flags;
	record->ct_state = 0;
	record->ct_status = 0;
	record->ct_left = 0;
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	if (flags & FLAG_CLOSED)
		return true; /* the entry goes now */
	*reported = totals;
	row->ts = now;
	row->flags &= ~(FLAG_OPENED | FLAG_LATENCY);
	return true;
}

/* The translation is asked for as late as possible: of a connection that does not stand, conntrack may have made a new
 * entry. */
static __always_inline bool needs_join(const struct row *row)
{
	return row->nat == NAT_UNKNOWN || !(row->flags & FLAG_ESTABLISHED);
}

static __always_inline void join_again(const void *sk, struct connection *connection)
{
	learn_port(sk, &connection->row);
	if (needs_join(&connection->row))
		join(sk, connection, true);
}

/* How a connection ended. sk_err is set before the state changes (tcp_reset, tcp_write_err); it is 0 for a local
 * close and where no source port was left (tcp_v4_connect's failure path), which then is still 0. */
static __always_inline __u16 how_it_ended(const void *socket, const struct row *row)
{
	int error;

	READ(error, socket, OFFSET_sock__sk_err);
	if (error)
		return error;
	if (row->flags & FLAG_ESTABLISHED)
		return 0;
	return row->tuple.src_port ? RESULT_ABORTED : EADDRNOTAVAIL;
}

/* The translation was kept for this connection; unless conntrack has made a new entry of the tuple, it goes with it. */
static __always_inline void let_go(const struct connection *connection)
{
	struct translation *translation;
	struct tuple tuple;

	key_of(connection, &tuple);
	tuple.zone = connection->row.ct_zone;
	translation = bpf_map_lookup_elem_(TRANSLATIONS, &tuple);
	if (translation && translation->ended && translation->conn_id == connection->row.conn_id)
		DELETE(TRANSLATIONS, &tuple);
}

/* The last row, and the end of the entry. The socket's counters are still there. */
static __always_inline void finish(const void *socket, const void *sk, struct connection *connection)
{
	struct row *row = &connection->row;

	if (excluded_loopback(row) || unwanted(row))
		goto excluded;
	if (!emit(sk, connection, bpf_ktime_get_boot_ns(), how_it_ended(socket, row), FLAG_CLOSED))
		goto lost;
	count(COUNT_CLOSED);
	if (row->nat == NAT_UNKNOWN)
		goto unresolved;
told:
	if (row->keeps)
		goto keeps;
forget:
	remove_connection(socket);
	return;

unresolved:
	count(COUNT_UNRESOLVED);
	goto told;
lost:
	count(COUNT_LOST_RING);
	goto untold;
excluded:
	count(COUNT_EXCLUDED);
untold: /* Of a refusal the claim says in the row's place whose it was (tracer/kernel/flows.py), until a dump. */
	if (!row->keeps || !(row->flags & FLAG_ESTABLISHED))
		goto forget;
keeps:
	let_go(connection);
	goto forget;
}

/* The entry is of an earlier socket at this address, whose end was missed. */
static __always_inline void end_was_missed(const void *socket, const struct connection *connection)
{
	count(COUNT_LOST_END);
	if (connection->row.keeps)
		let_go(connection);
	remove_connection(socket);
}

/* SYN_SENT -> ESTABLISHED: the source port is known now, and conntrack confirmed the entry before the SYN left. And
 * -> CLOSE, in any context. One function for both, so that the program holds the join once: what it costs is, for the
 * most part, fetching it into the cache. The type of `socket` becomes known only where it is needed. */
static __always_inline void connection_moves(const void *socket, __u64 old_state, bool ends)
{
	__u64 key = (__u64)socket;
	struct connection *connection = find_connection(socket);
	struct row *row;
	const void *sk;
	__u16 port;

	if (!connection && old_state != BPF_TCP_SYN_SENT && !control(CONTROL_CROWDED))
		LEAVE(0); /* an accepted socket, or not traced */
	sk = tcp_socket(socket);
	if (!sk)
		return; /* no TCP socket: not offered */
	if (!connection)
		goto unknown;
known:
	row = &connection->row;
	if (ends) {
		if (!is_entry_of(socket, sk, connection))
			goto missed;
		learn_port(sk, row);
		/* Said here too: a simultaneous open skips SYN_SENT -> ESTABLISHED. */
		if (old_state != BPF_TCP_SYN_SENT && old_state != BPF_TCP_SYN_RECV)
			row->flags |= FLAG_ESTABLISHED;
		if (needs_join(row))
			goto joins;
	last:
		finish(socket, sk, connection);
		return;
	}
	READ(port, socket, OFFSET_sock_common__skc_num);
	row->tuple.src_port = bpf_htons(port);
	row->flags |= FLAG_ESTABLISHED;
	if (row->started) {
		row->connect_latency_us = (bpf_ktime_get_boot_ns() - row->started) / 1000;
		row->flags |= FLAG_LATENCY;
	}
joins:
	join(sk, connection, ends);
	if (ends)
		goto last;
	if (excluded_loopback(row)) {
		remove_connection(socket);
		count(COUNT_EXCLUDED);
	}
	return;

missed:
	end_was_missed(socket, connection);
	return;
unknown:
	if (old_state == BPF_TCP_SYN_SENT) {
		connection = connection_began(sk, &key);
		if (connection)
			goto known;
		if (!ends)
			return; /* not traced, or counted as lost when it began */
	}
	forget_crowded_out(&key);
}

/* Whether nobody has seen this socket begin. If it was not taken in while the tracer stops, or for want of room, that
 * has been counted, and is not looked at again. */
static __always_inline bool has_not_begun(const void *socket)
{
	__u64 key = (__u64)socket;
	struct connection *connection = find_connection(socket);
	const void *sk;

	if (!connection)
		return !control(CONTROL_PAUSE) && control(CONTROL_CROWDED) != CROWDED_NOT_ALL_KNOWN &&
		       !is_crowded_out(&key);
	sk = tcp_socket(socket);
	return sk && !is_entry_of(socket, sk, connection); /* else it is an earlier socket's */
}

/* Whether nobody has seen this connection stand, or end. */
static __always_inline bool has_not_moved(const void *socket, bool ends)
{
	__u64 key = (__u64)socket;
	struct connection *connection = find_connection(socket);

	return connection && (ends || !(connection->row.flags & FLAG_ESTABLISHED));
}

/* The socket is freed. Its entry is gone, unless its end was missed (tracer.c). */
static __always_inline void socket_vanishes(const void *socket)
{
	__u64 key = (__u64)socket;
	struct connection *connection = find_connection(socket);
	const void *sk;
	__u32 rtt;

	if (!connection) { /* as it should be: no loss */
		if (!control(CONTROL_CROWDED))
			LEAVE(0);
		forget_crowded_out(&key);
		return;
	}
	sk = tcp_socket(socket);
	if (!sk)
		return; /* no TCP socket: not offered */
	count(COUNT_LATE_END);
	if (!is_entry_of(socket, sk, connection)) {
		end_was_missed(socket, connection);
		return;
	}
	READ(rtt, sk, OFFSET_tcp_sock__srtt_us);
	if (rtt) /* measured by the handshake at the latest */
		connection->row.flags |= FLAG_ESTABLISHED;
	join_again(sk, connection);
	finish(socket, sk, connection);
}

#endif
