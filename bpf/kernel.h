/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Reading the kernel's structures: no kernel header, but byte offsets that the loader found in BTF and passes
 * as -D OFFSET_<struct>__<field> (tracer/kernel/btf.py lists them). */
#ifndef TRACER_KERNEL_H
#define TRACER_KERNEL_H

#include "maps.h"

/* A program's instructions are rarely in the cache when an event comes, so each line of them that the usual path does
 * not touch is time. clang leaves BPF's instructions in the order of the source, whatever is said to be likely: what is
 * rare stands behind what is usual. A `return` is a jump to the one end of the program, which lies behind all of it;
 * LEAVE ends the program on the spot. */
#define LEAVE(value)                                     \
	do {                                             \
		asm volatile("r0 = " #value "\n\texit"); \
		__builtin_unreachable();                 \
	} while (0)
#define NO_UNROLL _Pragma("clang loop unroll(disable)")

/* Of two deletions in two maps clang makes one, with the map in a register: the kernel could then not tell which kind of
 * map it is, and call that kind's function. No two of these are the same. */
#define DELETE(map, key) DELETE_APART(map, key, __COUNTER__)
#define DELETE_APART(map, key, number)                         \
	({                                                     \
		long missing = bpf_map_delete_elem_(map, key); \
                                                               \
		asm volatile("# deletion " TEXT(number));      \
		missing;                                       \
	})
#define BARRIER() asm volatile("" ::: "memory")
/* What was written is seen before what follows is read. The 64-bit word stays as it is. */
#define FULL_BARRIER(word) asm volatile("lock *(u64 *)(%0 + 0) += %1" ::"r"(&(word)), "r"(0ULL) : "memory")

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_SCTP 132
#define IPPROTO_MPTCP 262
#define EADDRNOTAVAIL 99
#define ECONNRESET 104
#define ECONNREFUSED 111
#define EEXIST 17

/* Reads the field at `offset` of a kernel object that the verifier knows the type of: a plain load, which the kernel
 * makes safe, at a tenth of the cost of bpf_probe_read_kernel. Volatile, so that the compiler neither joins nor widens
 * loads: the verifier wants each within one field. */
#define READ(destination, object, offset) \
	((destination) = *(volatile typeof(destination) *)((const void *)(object) + (offset)))

static __always_inline void set_v4(struct address *address, __u32 v4)
{
	address->words[0] = 0;
	address->words[1] = 0;
	address->words[2] = bpf_htonl(0xffff);
	address->words[3] = v4;
}

static __always_inline bool is_v4(const struct address *address)
{
	return address->halves[0] == 0 && address->words[2] == bpf_htonl(0xffff);
}

/* 127.0.0.0/8 or ::1 */
static __always_inline bool is_loopback(const struct address *address)
{
	if (is_v4(address))
		return address->bytes[12] == 127;
	return address->halves[0] == 0 && address->words[2] == 0 && address->words[3] == bpf_htonl(1);
}

/* 0.0.0.0 or ::, which connect() takes for the host itself */
static __always_inline bool is_any(const struct address *address)
{
	if (is_v4(address))
		return address->words[3] == 0;
	return address->halves[0] == 0 && address->halves[1] == 0;
}

static __always_inline bool same_address(const struct address *a, const struct address *b)
{
	return a->halves[0] == b->halves[0] && a->halves[1] == b->halves[1];
}

/* By their numbers, not by bcc's names: where bcc does not find those among the kernel's symbols, which are hidden by
 * kptr_restrict=2 and from whoever lacks CAP_SYSLOG, it calls bpf_probe_read instead, which not every type has. */
static long (*const probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)BPF_FUNC_probe_read_kernel;
static long (*const probe_read_user)(void *to, __u32 size, const void *from) = (void *)BPF_FUNC_probe_read_user;

/* The same for an object whose type the verifier does not know. What cannot be read is zero. */
#define PROBE(destination, object, offset) \
	probe_read_kernel(&(destination), sizeof(destination), (const void *)(object) + (offset))

/* The socket as a tcp_sock, whose fields the verifier then knows; NULL for what only shares the hook: an MPTCP
 * parent (its counters mean something else; its subflows are TCP), a time-wait or request socket (smaller
 * structures). */
static __always_inline const void *tcp_socket(const void *sk)
{
	return bpf_skc_to_tcp_sock((void *)sk);
}

/* For each way of reading:
 * read_tuple: the tuple of a socket as its own side sees it; false if it is of no IP family. An IPv6 socket talking to
 * a v4-mapped address has both: the v6 fields are read, and say ::ffff:a.b.c.d. The local port is skc_num, 0 until the
 * kernel has chosen one.
 * read_netns: the inode number of its network namespace. */
#define DEFINE_SOCKET_READERS(suffix, GET)                                                                 \
	static __always_inline bool read_tuple##suffix(const void *sk, struct tuple *tuple, __u8 protocol) \
	{                                                                                                  \
		__u16 family = 0, port = 0;                                                                \
		__u32 v4 = 0;                                                                              \
                                                                                                           \
		GET(family, sk, OFFSET_sock_common__skc_family);                                           \
		GET(port, sk, OFFSET_sock_common__skc_num);                                                \
		tuple->src_port = bpf_htons(port);                                                         \
		GET(tuple->dst_port, sk, OFFSET_sock_common__skc_dport);                                   \
		tuple->zone = 0;                                                                           \
		tuple->protocol = protocol;                                                                \
		tuple->reserved = 0;                                                                       \
		if (family == AF_INET) {                                                                   \
			GET(v4, sk, OFFSET_sock_common__skc_rcv_saddr);                                    \
			set_v4(&tuple->src, v4);                                                           \
			GET(v4, sk, OFFSET_sock_common__skc_daddr);                                        \
			set_v4(&tuple->dst, v4);                                                           \
			return true;                                                                       \
		}                                                                                          \
		if (family != AF_INET6)                                                                    \
			return false;                                                                      \
		for (int i = 0; i < 4; i++)                                                                \
			GET(tuple->src.words[i], sk, OFFSET_sock_common__skc_v6_rcv_saddr + 4 * i);        \
		for (int i = 0; i < 4; i++)                                                                \
			GET(tuple->dst.words[i], sk, OFFSET_sock_common__skc_v6_daddr + 4 * i);            \
		return true;                                                                               \
	}                                                                                                  \
                                                                                                           \
	static __always_inline __u32 read_netns##suffix(const void *sk)                                    \
	{                                                                                                  \
		const void *net = NULL;                                                                    \
		__u32 inode = 0;                                                                           \
                                                                                                           \
		GET(net, sk, OFFSET_sock_common__skc_net);                                                 \
		GET(inode, net, OFFSET_net__ns + OFFSET_ns_common__inum);                                  \
		return inode;                                                                              \
	}

DEFINE_SOCKET_READERS(, READ)
DEFINE_SOCKET_READERS(_probed, PROBE)

/* Who calls. */
struct process {
	__u64 cgroup_id;
	__u64 comm[2];
	__u32 pid;
};

static __always_inline void read_process_probed(struct process *process)
{
	process->pid = bpf_get_current_pid_tgid() >> 32;
	process->cgroup_id = bpf_get_current_cgroup_id();
	bpf_get_current_comm(process->comm, sizeof(process->comm));
}

#if HAS_TASK_BTF
static const void *(*const current_task)(void) = (void *)BPF_FUNC_get_current_task_btf;

/* Behind the end of a task's name something of an earlier name may stand (before 06c5088aeedc, 5.17). Little-endian, as
 * the search for a zero byte is (Warren, Hacker's Delight, 6-1), which errs only above the first one. */
static __always_inline __u64 until_nul(__u64 text)
{
	__u64 nul = (text - 0x0101010101010101ULL) & ~text & 0x8080808080808080ULL;

	return text & (((nul & -nul) >> 7) - 1);
}

/* The same by typed loads, at a small part of the cost (docs/decisions/023-cheaper-programs.md). */
static __always_inline void read_process(struct process *process)
{
	const void *task = current_task(), *groups, *group, *node;
	__u64 text;

	READ(process->pid, task, OFFSET_task_struct__tgid);
	READ(text, task, OFFSET_task_struct__comm);
	process->comm[0] = until_nul(text);
	process->comm[1] = 0;
	if (process->comm[0] == text && text >> 56) {
		READ(text, task, OFFSET_task_struct__comm + sizeof(text));
		process->comm[1] = until_nul(text);
	}
	READ(groups, task, OFFSET_task_struct__cgroups);
	READ(group, groups, OFFSET_css_set__dfl_cgrp);
	READ(node, group, OFFSET_cgroup__kn);
	READ(process->cgroup_id, node, OFFSET_kernfs_node__id);
}
#else
#define read_process read_process_probed
#endif

#define NF_INET_LOCAL_OUT 3

/* Whether something in a socket's own namespace hooks into what it sends: a mesh's redirect, a firewall, conntrack. */
static __always_inline bool is_hooked(const void *sk, const struct tuple *tuple)
{
	const void *net, *hooks;

	READ(net, sk, OFFSET_sock_common__skc_net);
	if (is_v4(&tuple->dst))
		READ(hooks, net, OFFSET_net__nf + OFFSET_netns_nf__hooks_ipv4 + NF_INET_LOCAL_OUT * sizeof(hooks));
	else
		READ(hooks, net, OFFSET_net__nf + OFFSET_netns_nf__hooks_ipv6 + NF_INET_LOCAL_OUT * sizeof(hooks));
	return hooks != NULL;
}

/* Totals of a TCP socket, as the contract counts them. bytes_received counts a received FIN as a byte (it follows
 * rcv_nxt, tcp_rcv_nxt_update), and tcp_fin() sets SOCK_DONE right after it; bytes_sent counts no SYN and no FIN, but
 * retransmitted bytes again (tcp_output.c). */
static __always_inline void read_totals(const void *sk, struct reported *totals)
{
	__u64 retransmitted;
	unsigned long flags;

	READ(totals->bytes_sent, sk, OFFSET_tcp_sock__bytes_sent);
	READ(retransmitted, sk, OFFSET_tcp_sock__bytes_retrans);
	READ(totals->bytes_received, sk, OFFSET_tcp_sock__bytes_received);
	READ(totals->packets_sent, sk, OFFSET_tcp_sock__segs_out);
	READ(totals->packets_received, sk, OFFSET_tcp_sock__segs_in);
	READ(totals->retransmits, sk, OFFSET_tcp_sock__total_retrans);
	READ(flags, sk, OFFSET_sock_common__skc_flags);
	totals->bytes_sent -= retransmitted;
	if (flags & (1UL << SOCK_DONE))
		totals->bytes_received -= 1;
}

#endif
