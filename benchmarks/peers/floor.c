/* The least that a FUSE server in C can do: what no server through /dev/fuse is expected to beat by much.
 *
 *     floor MANIFEST CONTENT MOUNTPOINT        serves until unmounted
 *
 * A read-only tree in memory tables, contents by pread from one packed file. Everything that lets the kernel ask less
 * is on: entries and attributes (absent names too) valid for ever, READDIRPLUS always, OPEN and OPENDIR refused with
 * ENOSYS (then the kernel opens by itself and keeps pages and directories), requests of 1 MiB, two threads.
 *
 * MANIFEST has one line per entry, the root first, children of one directory consecutive and sorted:
 *     PARENT KIND OFFSET SIZE NAME             PARENT: number of a line, from 0; KIND: d, f or x (executable)
 * Node id of an entry = number of its line + 1.
 */
#define FUSE_USE_VERSION 312
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FOR_EVER 1e9
#define READ_MOST (1 << 20)

struct entry {
	char *name;
	uint64_t offset, size;
	uint32_t parent, first, count; /* children of a directory */
	char kind;
};

static struct entry *entries;
static uint32_t entry_count, *slots, slot_mask;
static int content;
static __thread char buffer[READ_MOST];

static uint32_t slot_of(uint32_t parent, const char *name)
{
	uint64_t hash = 0xcbf29ce484222325u ^ parent * 0x9e3779b97f4a7c15u;
	for (; *name; name++)
		hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
	return (hash ^ hash >> 32) & slot_mask;
}

static struct entry *entry_of(fuse_ino_t node)
{
	return node >= 1 && node <= entry_count ? &entries[node - 1] : NULL;
}

static void fill(uint32_t number, struct fuse_entry_param *out)
{
	const struct entry *e = &entries[number];
	memset(out, 0, sizeof *out);
	out->ino = out->attr.st_ino = number + 1;
	out->attr_timeout = out->entry_timeout = FOR_EVER;
	out->attr.st_mode = e->kind == 'd' ? S_IFDIR | 0555 : S_IFREG | (e->kind == 'x' ? 0555 : 0444);
	out->attr.st_nlink = 1;
	out->attr.st_size = e->size;
	out->attr.st_blocks = (e->size + 511) / 512;
	out->attr.st_blksize = 4096;
	out->attr.st_mtime = out->attr.st_atime = out->attr.st_ctime = 1;
}

static void on_init(void *data, struct fuse_conn_info *conn)
{
	(void)data;
	conn->want |= conn->capable & (FUSE_CAP_READDIRPLUS | FUSE_CAP_PARALLEL_DIROPS | FUSE_CAP_ASYNC_READ);
	conn->want &= ~FUSE_CAP_READDIRPLUS_AUTO;
	conn->max_background = 0xffff;
	conn->congestion_threshold = 0xc000;
	if (conn->max_readahead < READ_MOST)
		conn->max_readahead = READ_MOST;
}

static void on_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param out = {.entry_timeout = FOR_EVER}; /* node 0: absent, and remembered as that */
	for (uint32_t at = slot_of(parent - 1, name); slots[at]; at = (at + 1) & slot_mask) {
		const struct entry *e = &entries[slots[at]];
		if (e->parent == parent - 1 && strcmp(e->name, name) == 0) {
			fill(slots[at], &out);
			break;
		}
	}
	fuse_reply_entry(req, &out);
}

static void on_getattr(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *info)
{
	struct fuse_entry_param out;
	(void)info;
	if (!entry_of(node)) {
		fuse_reply_err(req, ESTALE);
		return;
	}
	fill(node - 1, &out);
	fuse_reply_attr(req, &out.attr, FOR_EVER);
}

static void on_open(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *info)
{
	(void)node, (void)info;
	fuse_reply_err(req, ENOSYS);
}

/* Offset n: after the nth of ".", "..", children. */
static void list(fuse_req_t req, fuse_ino_t node, size_t size, uint64_t offset, int plus)
{
	const struct entry *directory = entry_of(node);
	size_t used = 0;
	if (!directory || directory->kind != 'd') {
		fuse_reply_err(req, ENOTDIR);
		return;
	}
	if (size > sizeof buffer)
		size = sizeof buffer;
	for (; offset < directory->count + 2ull; offset++) {
		struct fuse_entry_param out;
		uint32_t child = offset == 0   ? node - 1
				 : offset == 1 ? directory->parent
					       : directory->first + (uint32_t)offset - 2;
		const char *name = offset == 0 ? "." : offset == 1 ? ".." : entries[child].name;
		fill(child, &out);
		if (offset < 2)
			out.ino = 0;
		size_t length = plus ? fuse_add_direntry_plus(req, buffer + used, size - used, name, &out, offset + 1)
				     : fuse_add_direntry(req, buffer + used, size - used, name, &out.attr, offset + 1);
		if (length > size - used)
			break;
		used += length;
	}
	fuse_reply_buf(req, buffer, used);
}

static void on_readdir(fuse_req_t req, fuse_ino_t node, size_t size, off_t offset, struct fuse_file_info *info)
{
	(void)info;
	list(req, node, size, offset, 0);
}

static void on_readdirplus(fuse_req_t req, fuse_ino_t node, size_t size, off_t offset, struct fuse_file_info *info)
{
	(void)info;
	list(req, node, size, offset, 1);
}

static void on_read(fuse_req_t req, fuse_ino_t node, size_t size, off_t offset, struct fuse_file_info *info)
{
	const struct entry *e = entry_of(node);
	(void)info;
	if (!e || e->kind == 'd') {
		fuse_reply_err(req, EISDIR);
		return;
	}
	if ((uint64_t)offset >= e->size)
		size = 0;
	else if (size > e->size - offset)
		size = e->size - offset;
	if (size > sizeof buffer)
		size = sizeof buffer;
	ssize_t got = pread(content, buffer, size, e->offset + offset);
	if (got < 0)
		fuse_reply_err(req, errno);
	else
		fuse_reply_buf(req, buffer, got);
}

static const struct fuse_lowlevel_ops operations = {
	.init = on_init, .lookup = on_lookup, .getattr = on_getattr, .open = on_open, .opendir = on_open,
	.readdir = on_readdir, .readdirplus = on_readdirplus, .read = on_read,
};

static void load(const char *path)
{
	FILE *in = fopen(path, "r");
	uint32_t room = 0;
	struct entry e = {0};
	if (!in) {
		perror(path);
		exit(1);
	}
	while (fscanf(in, "%u %c %lu %lu %m[^\n]", &e.parent, &e.kind, &e.offset, &e.size, &e.name) == 5) {
		if (entry_count == room)
			entries = realloc(entries, (room = room ? 2 * room : 1024) * sizeof e);
		entries[entry_count++] = e;
	}
	fclose(in);
	for (slot_mask = 1024; slot_mask < 2 * entry_count; slot_mask *= 2)
		;
	slots = calloc(slot_mask, sizeof *slots); /* 0, the root, has no slot */
	slot_mask--;
	for (uint32_t n = 1; n < entry_count; n++) {
		struct entry *parent = &entries[entries[n].parent];
		uint32_t at = slot_of(entries[n].parent, entries[n].name);
		if (parent->count++ == 0)
			parent->first = n;
		while (slots[at])
			at = (at + 1) & slot_mask;
		slots[at] = n;
	}
}

int main(int argc, char **argv)
{
	char *options[] = {argv[0], "-oro,allow_other,default_permissions,fsname=floor", NULL};
	struct fuse_args args = FUSE_ARGS_INIT(2, options);
	if (argc != 4) {
		fprintf(stderr, "usage: floor MANIFEST CONTENT MOUNTPOINT\n");
		return 2;
	}
	load(argv[1]);
	content = open(argv[2], O_RDONLY | O_CLOEXEC);
	struct fuse_session *session = fuse_session_new(&args, &operations, sizeof operations, NULL);
	if (content < 0 || !entry_count || !session || fuse_session_mount(session, argv[3]) != 0)
		return 1;
	struct fuse_loop_config *config = fuse_loop_cfg_create();
	fuse_loop_cfg_set_max_threads(config, 2);
	fuse_loop_cfg_set_idle_threads(config, 2);
	fuse_set_signal_handlers(session);
	int status = fuse_session_loop_mt(session, config);
	fuse_session_unmount(session);
	fuse_session_destroy(session);
	return status ? 1 : 0;
}
