/* The least that a lower store can do: the Nix worker protocol (1.38) answered from memory, nothing looked up, nothing checked.
 *
 *     instant_lower SOCKET TABLE        writes a byte to standard output when clients may connect; serves until killed
 *
 * TABLE is records of: length (u64, native), path; length (u64, native), the whole reply to QueryPathInfo.
 * One process per connection. What is not one of Nix's questions while it registers a closure ends the connection.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define LAST 0x616c7473u
#define MOST (1 << 20)

struct slot {
	const char *path, *reply;
	uint64_t path_size, reply_size;
};

static struct slot *slots;
static uint64_t mask;
static int client;
static char in[MOST], out[MOST];
static size_t in_at, in_end, out_size;

static uint64_t number_at(const char *at)
{
	uint64_t value;
	memcpy(&value, at, 8);
	return value;
}

static struct slot *slot_of(const char *path, uint64_t size)
{
	uint64_t hash = 0xcbf29ce484222325u;
	for (uint64_t i = 0; i < size; i++)
		hash = (hash ^ (unsigned char)path[i]) * 0x100000001b3u;
	struct slot *slot;
	while ((slot = &slots[hash++ & mask])->path)
		if (slot->path_size == size && !memcmp(slot->path, path, size))
			break;
	return slot;
}

static void load(const char *name)
{
	FILE *file = fopen(name, "rb");
	if (!file || fseek(file, 0, SEEK_END))
		exit(1);
	size_t size = ftell(file);
	char *data = malloc(size);
	rewind(file);
	if (fread(data, 1, size, file) != size)
		exit(1);
	uint64_t count = 0;
	for (char *at = data; at < data + size; at += 8 + number_at(at))
		count++;
	for (mask = 1; mask < 2 * count; mask *= 2)
		;
	slots = calloc(mask--, sizeof *slots);
	for (char *at = data; at < data + size;) {
		struct slot one = {.path = at + 8, .path_size = number_at(at)};
		at += 8 + one.path_size;
		one.reply = at + 8, one.reply_size = number_at(at);
		at += 8 + one.reply_size;
		*slot_of(one.path, one.path_size) = one;
	}
}

static void flush(void)
{
	for (size_t sent = 0; sent < out_size;) {
		ssize_t size = write(client, out + sent, out_size - sent);
		if (size <= 0)
			exit(0);
		sent += size;
	}
	out_size = 0;
}

static void put(const void *data, size_t size)
{
	if (out_size + size > MOST)
		exit(1);
	memcpy(out + out_size, data, size);
	out_size += size;
}

static void put_number(uint64_t value)
{
	put(&value, 8);
}

/* ``size`` bytes of input, valid until the next call. */
static const char *take(size_t size)
{
	if (size > MOST)
		exit(1);
	if (in_end - in_at < size) {
		memmove(in, in + in_at, in_end -= in_at);
		in_at = 0;
	}
	while (in_end < size) {
		ssize_t got = read(client, in + in_end, MOST - in_end);
		if (got <= 0)
			exit(0);
		in_end += got;
	}
	in_at += size;
	return in + in_at - size;
}

static uint64_t number(void)
{
	return number_at(take(8));
}

static const char *string(uint64_t *size)
{
	*size = number();
	if (*size > MOST / 2)
		exit(1);
	return take((*size + 7) & ~7ull);
}

static struct slot *path(void)
{
	uint64_t size;
	const char *text = string(&size);
	return slot_of(text, size);
}

static void greet(void)
{
	uint64_t size;
	number();
	put_number(0x6478696f), put_number(0x126), flush();
	if (number() >= 0x126) {
		for (uint64_t left = number(); left; left--)
			string(&size);
		put_number(0), flush();
	}
	if (number())
		number();
	number();
	put_number(7), put("instant", 8), put_number(2), put_number(LAST);
}

static void answer(void)
{
	uint64_t size, left;
	struct slot *found;
	switch (number()) {
	case 1:
		found = path();
		put_number(LAST), put_number(found->path != NULL);
		return;
	case 11:
		path();
		put_number(LAST), put_number(1);
		return;
	case 19:
		take(12 * 8);
		for (left = 2 * number(); left; left--)
			string(&size);
		put_number(LAST);
		return;
	case 26:
		found = path();
		if (found->path)
			put(found->reply, found->reply_size);
		else
			put_number(LAST), put_number(0);
		return;
	case 31: {
		put_number(LAST);
		size_t count_at = out_size;
		put_number(0);
		uint64_t count = 0;
		for (left = number(); left; left--) {
			found = path();
			if (!found->path)
				continue;
			count++;
			put_number(found->path_size), put(found->path, found->path_size);
			put("\0\0\0\0\0\0\0", -found->path_size & 7);
		}
		memcpy(out + count_at, &count, 8);
		number();
		return;
	}
	case 43:
		string(&size);
		put_number(LAST), put_number(0);
		return;
	default:
		flush();
		exit(1);
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	if (argc != 3 || strlen(argv[1]) >= sizeof address.sun_path)
		return 2;
	load(argv[2]);
	strcpy(address.sun_path, argv[1]);
	int listening = socket(AF_UNIX, SOCK_STREAM, 0);
	if (bind(listening, (struct sockaddr *)&address, sizeof address) || listen(listening, 16))
		return 1;
	signal(SIGCHLD, SIG_IGN);
	if (write(1, "1", 1) != 1)
		return 1;
	while ((client = accept(listening, NULL, NULL)) >= 0) {
		if (!fork()) {
			greet();
			for (;; answer())
				if (in_at == in_end)
					flush();
		}
		close(client);
	}
	return 1;
}
