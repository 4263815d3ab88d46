// The demo's target: a small shop in SQLite that is asked the same questions for ever, on one thread.
//
// It is a program of its own, in plain C and stripped, so that it is to dyni what any server of a distribution is: nothing
// of it knows of dyni. The questions are what an application sends: point lookups, joins, groups, sorting, LIKE, a
// recursive query, window functions, an update that is rolled back. Most are prepared anew each time, as most
// applications do, so that SQLite's parser, planner and code generator run as well as its virtual machine: a few hundred
// kilobytes of code, far more than a first-level instruction cache holds. The data is small, so that the processor waits
// for code and not for data.
//
// Every answer is compared: with the one to the same question in the first period, before anything was done to the
// process, and now and then with the same shop in plain arrays.
//
// The score is published in shared memory, the target's standard input (see board.rs, which has the same struct): how
// many operations were completed and how much CPU time was used at that very instant, so that no operation is cut in half.

#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "sqlite3.h"

enum { PERIOD = 64, CUSTOMERS = 300, PRODUCTS = 120, ORDERS = 1500, LINES = 4, CHECK_EVERY = 4096 };

// `version` is odd while the others change: a sequence lock with one writer.
struct board {
    uint64_t version, operations, cpu_ns, answers, wrong, ready, stop;
};

static sqlite3 *db;
static char names[CUSTOMERS][16];
static uint64_t prices[PRODUCTS];
static struct order {
    uint64_t customer, day, lines;
    struct { uint64_t product, quantity; } line[LINES];
} orders[ORDERS];

static void fail(const char *what) {
    fprintf(stderr, "dyni: the demo's target stopped: %s: %s\n", what, db ? sqlite3_errmsg(db) : "");
    exit(1);
}

static void must(int result, const char *what) {
    if (result != SQLITE_OK && result != SQLITE_DONE && result != SQLITE_ROW) fail(what);
}

// Numbers that are the same on every host (xorshift64*).
static uint64_t below(uint64_t *state, uint64_t bound) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return ((*state * 0x2545F4914F6CDD1D) >> 33) % bound;
}

// A running hash of answers: it has to notice a wrong answer, not an enemy.
static void add(uint64_t *hash, uint64_t word) {
    *hash = (*hash ^ word) * 0x9E3779B97F4A7C15;
    *hash = *hash << 29 | *hash >> 35;
}

static void add_value(uint64_t *hash, sqlite3_stmt *statement, int column) {
    switch (sqlite3_column_type(statement, column)) {
    case SQLITE_NULL:
        add(hash, 1);
        break;
    case SQLITE_INTEGER:
        add(hash, (uint64_t)sqlite3_column_int64(statement, column));
        break;
    case SQLITE_FLOAT: {
        double real = sqlite3_column_double(statement, column);
        uint64_t bits;
        memcpy(&bits, &real, sizeof bits);
        add(hash, bits);
        break;
    }
    default: {
        const char *text = sqlite3_column_blob(statement, column);
        size_t length = (size_t)sqlite3_column_bytes(statement, column);
        add(hash, length);
        for (size_t i = 0; i < length; i += 8) {
            uint64_t word = 0;
            memcpy(&word, text + i, length - i < 8 ? length - i : 8);
            add(hash, word);
        }
    }
    }
}

static void rows(uint64_t *hash, sqlite3_stmt *statement) {
    int columns = sqlite3_column_count(statement), result;
    while ((result = sqlite3_step(statement)) == SQLITE_ROW)
        for (int column = 0; column < columns; column++) add_value(hash, statement, column);
    must(result, "step");
}

static sqlite3_stmt *prepare(const char *sql) {
    sqlite3_stmt *statement;
    must(sqlite3_prepare_v2(db, sql, -1, &statement, NULL), sql);
    return statement;
}

// A question whose text is parsed and planned again; every value of the answer goes into the hash.
__attribute__((format(printf, 2, 3))) static void ask(uint64_t *hash, const char *format, ...) {
    char sql[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sql, sizeof sql, format, arguments);
    va_end(arguments);
    sqlite3_stmt *statement = prepare(sql);
    rows(hash, statement);
    must(sqlite3_finalize(statement), "finalize");
}

static void run(const char *sql) { must(sqlite3_exec(db, sql, NULL, NULL, NULL), sql); }

static void make(void) {
    static const char *const syllables[] = {"an", "bel", "cor", "dri", "el", "fin", "gar", "hul", "is", "jo", "kar", "lun"};
    uint64_t numbers = 0x5EED0F5EED001234;
    for (int i = 0; i < PRODUCTS; i++) prices[i] = 100 + below(&numbers, 9900);
    for (int i = 0; i < CUSTOMERS; i++)
        for (int s = 0; s < 3; s++) strcat(names[i], syllables[below(&numbers, 12)]);
    for (int i = 0; i < ORDERS; i++) {
        orders[i].customer = below(&numbers, CUSTOMERS);
        orders[i].day = below(&numbers, 365);
        orders[i].lines = 1 + below(&numbers, LINES);
        for (uint64_t l = 0; l < orders[i].lines; l++) {
            orders[i].line[l].product = below(&numbers, PRODUCTS);
            orders[i].line[l].quantity = 1 + below(&numbers, 9);
        }
    }
}

static void fill(void) {
    static const char *const cities[] = {"Aachen", "Bergen", "Cadiz", "Dublin", "Espoo", "Firenze", "Gent", "Hamburg"};
    uint64_t none = 0;
    must(sqlite3_open_v2(":memory:", &db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, NULL), "open");
    run("BEGIN;"
        "CREATE TABLE customer (id INTEGER PRIMARY KEY, name TEXT NOT NULL, city TEXT NOT NULL, visits INTEGER);"
        "CREATE TABLE product (id INTEGER PRIMARY KEY, price INTEGER NOT NULL, tags TEXT);"
        "CREATE TABLE purchase (id INTEGER PRIMARY KEY, customer INTEGER NOT NULL, day INTEGER NOT NULL);"
        "CREATE TABLE line (purchase INTEGER, product INTEGER, quantity INTEGER);"
        "CREATE INDEX purchase_customer ON purchase (customer, day);"
        "CREATE INDEX line_purchase ON line (purchase);"
        "CREATE INDEX customer_name ON customer (name);");
    for (int i = 0; i < CUSTOMERS; i++)
        ask(&none, "INSERT INTO customer VALUES (%d, '%s', '%s', 0)", i, names[i], cities[i * 7 % 8]);
    for (int i = 0; i < PRODUCTS; i++)
        ask(&none, "INSERT INTO product VALUES (%d, %d, '{\"colour\":\"c%d\",\"size\":%d,\"parts\":[%d,%d]}')", i,
            (int)prices[i], i % 7, i % 40, i, i * 3);
    for (int i = 0; i < ORDERS; i++) {
        ask(&none, "INSERT INTO purchase VALUES (%d, %d, %d)", i, (int)orders[i].customer, (int)orders[i].day);
        for (uint64_t l = 0; l < orders[i].lines; l++)
            ask(&none, "INSERT INTO line VALUES (%d, %d, %d)", i, (int)orders[i].line[l].product,
                (int)orders[i].line[l].quantity);
    }
    run("COMMIT; ANALYZE");
}

// One operation: the same questions for the same step modulo PERIOD. Returns the hash of the answers.
static uint64_t operation(uint64_t step) {
    static sqlite3_stmt *lookup;
    if (!lookup) lookup = prepare("SELECT id, customer, day FROM purchase WHERE id = ?1");
    static const char *const words[] = {"anbel", "corf", "drig", "elis", "karl", "lun"};
    uint64_t numbers = 0xD15C0000 + step % PERIOD, hash = 0xCBF29CE484222325;
    for (int i = 0; i < 6; i++) {
        must(sqlite3_bind_int64(lookup, 1, (sqlite3_int64)below(&numbers, ORDERS)), "bind");
        rows(&hash, lookup);
        must(sqlite3_reset(lookup), "reset");
    }
    for (int i = 0; i < 3; i++)
        ask(&hash, "SELECT name, city, visits FROM customer WHERE id = %d", (int)below(&numbers, CUSTOMERS));
    int customer = (int)below(&numbers, CUSTOMERS), day = (int)below(&numbers, 300);
    ask(&hash,
        "SELECT c.name, o.day, sum(l.quantity * p.price) AS total FROM customer c "
        "JOIN purchase o ON o.customer = c.id JOIN line l ON l.purchase = o.id JOIN product p ON p.id = l.product "
        "WHERE c.id = %d GROUP BY o.id ORDER BY total DESC, o.id LIMIT 5",
        customer);
    ask(&hash,
        "SELECT city, count(*), group_concat(DISTINCT substr(name, 1, 3)), max(o.day) FROM customer c "
        "JOIN purchase o ON o.customer = c.id WHERE o.id BETWEEN %d AND %d "
        "GROUP BY city HAVING count(*) > 1 ORDER BY count(*) DESC, city",
        day * 4, day * 4 + 40);
    ask(&hash,
        "SELECT id, name || ':' || upper(city), length(name) FROM customer "
        "WHERE name LIKE '%%%s%%' AND id < 150 ORDER BY name DESC, id LIMIT 8",
        words[below(&numbers, 6)]);
    int a = (int)below(&numbers, PRODUCTS), b = (int)below(&numbers, PRODUCTS), low = (int)below(&numbers, 9000);
    ask(&hash,
        "SELECT id, CASE WHEN price > 5000 THEN 'dear' WHEN price > 2000 THEN 'fair' ELSE 'cheap' END, "
        "printf('%%08.2f', price / 100.0), json_extract(tags, '$.parts[1]') FROM product "
        "WHERE id IN (%d, %d) OR price BETWEEN %d AND %d ORDER BY price, id",
        a, b, low, low + 60);
    ask(&hash,
        "SELECT id, day, rank() OVER (ORDER BY day), sum(day) OVER (ORDER BY id ROWS 2 PRECEDING) "
        "FROM purchase WHERE customer = %d ORDER BY id LIMIT 6",
        customer);
    ask(&hash,
        "WITH RECURSIVE n(i, s) AS (SELECT %d, 0 UNION ALL SELECT i - 7, s + i FROM n WHERE i > 200) "
        "SELECT count(*), max(s) FROM n",
        day);
    ask(&hash,
        "SELECT strftime('%%Y-%%m-%%d', '2024-01-01', '+%d days'), EXISTS (SELECT 1 FROM purchase WHERE day = %d "
        "AND customer NOT IN (SELECT id FROM customer WHERE city = 'Gent') LIMIT 1), "
        "coalesce((SELECT min(price) FROM product WHERE price > %d), 0)",
        day, day, day * 30);
    // Writes and takes it back: the b-tree's other half, with the data the same afterwards.
    run("SAVEPOINT visit");
    ask(&hash, "UPDATE customer SET visits = visits + 1 WHERE id = %d", customer);
    ask(&hash, "INSERT INTO purchase VALUES (NULL, %d, 364)", customer);
    ask(&hash, "SELECT visits, (SELECT max(id) FROM purchase) FROM customer WHERE id = %d", customer);
    run("ROLLBACK TO visit; RELEASE visit");
    return hash;
}

static uint64_t differs(uint64_t known, const char *sql) {
    sqlite3_stmt *statement = prepare(sql);
    must(sqlite3_step(statement), "step");
    uint64_t number = (uint64_t)sqlite3_column_int64(statement, 0);
    must(sqlite3_finalize(statement), "finalize");
    return number != known;
}

// Compares what SQLite answers with what the arrays say. Returns how many answers are wrong.
static uint64_t check(void) {
    uint64_t value = 0, wrong = 0;
    for (int i = 0; i < ORDERS; i++)
        for (uint64_t l = 0; l < orders[i].lines; l++) value += prices[orders[i].line[l].product] * orders[i].line[l].quantity;
    wrong += differs(value, "SELECT sum(l.quantity * p.price) FROM line l JOIN product p ON p.id = l.product");
    for (int customer = 0; customer < CUSTOMERS; customer += 29) {
        uint64_t days = 0;
        for (int i = 0; i < ORDERS; i++) days += orders[i].customer == (uint64_t)customer ? orders[i].day : 0;
        char sql[128];
        snprintf(sql, sizeof sql, "SELECT coalesce(sum(day), 0) FROM purchase WHERE customer = %d", customer);
        wrong += differs(days, sql);
    }
    uint64_t found = 0;
    for (int i = 0; i < CUSTOMERS; i++) found += strstr(names[i], "bel") != NULL;
    wrong += differs(found, "SELECT count(*) FROM customer WHERE name LIKE '%bel%'");
    wrong += differs(0, "SELECT sum(visits) FROM customer");
    wrong += differs(ORDERS, "SELECT count(*) FROM purchase");
    return wrong;
}

static void publish(struct board *board, const struct board *score) {
    uint64_t version = board->version;
    __atomic_store_n(&board->version, version + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    __atomic_store_n(&board->operations, score->operations, __ATOMIC_RELAXED);
    __atomic_store_n(&board->cpu_ns, score->cpu_ns, __ATOMIC_RELAXED);
    __atomic_store_n(&board->answers, score->answers, __ATOMIC_RELAXED);
    __atomic_store_n(&board->wrong, score->wrong, __ATOMIC_RELAXED);
    __atomic_store_n(&board->ready, score->ready, __ATOMIC_RELAXED);
    __atomic_store_n(&board->version, version + 2, __ATOMIC_RELEASE);
}

int main(int argc, char **argv) {
    struct stat size;
    if (argc != 3 || fstat(0, &size) || size.st_size != sizeof(struct board)) {
        fprintf(stderr, "dyni: the demo's target can't be used by itself: `dyni demo` starts it and reads its score\n");
        return 2;
    }
    struct board *board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, 0, 0);
    if (board == MAP_FAILED) fail("map the score board");
    // If the demo dies first, the kernel ends this process; if it has died already, there is nothing to do.
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || getppid() != atoi(argv[2])) return 1;
    // Both targets on one processor feel the same neighbours; where that is not allowed the figure is a little noisier.
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(atoi(argv[1]), &cpus);
    sched_setaffinity(0, sizeof cpus, &cpus);

    make();
    fill();
    static uint64_t expected[PERIOD];
    struct board score = {.wrong = check(), .answers = 1};
    while (!__atomic_load_n(&board->stop, __ATOMIC_RELAXED)) {
        uint64_t step = score.operations, got = operation(step);
        if (step < PERIOD) {
            expected[step] = got;
            score.answers = (score.answers << 7 | score.answers >> 57) ^ got;
        } else {
            score.wrong += expected[step % PERIOD] != got;
        }
        if (step % CHECK_EVERY == CHECK_EVERY - 1) score.wrong += check();
        score.operations++;
        score.ready = score.operations >= PERIOD;
        struct timespec time;
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
        score.cpu_ns = (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
        publish(board, &score);
    }
    return 0;
}
