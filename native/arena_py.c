/* kvfs._native.Arena: a shared mapping of one descriptor as a Python type. */
#include "pyutil.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MAP_SYNC
#define MAP_SYNC 0x80000
#endif
#ifndef MAP_SHARED_VALIDATE
#define MAP_SHARED_VALIDATE 0x03
#endif

typedef struct {
    PyObject_HEAD
    bool is_open;
    bool is_writable;
    unsigned exports;
    void *address;
    size_t nbytes;
} Arena;

static bool need_open(const Arena *self)
{
    if (!self->is_open)
        PyErr_SetString(PyExc_ValueError, "arena is closed");
    return self->is_open;
}

/* A file shorter than the mapping would turn an access into a SIGBUS; devices have no size. */
static bool check_size(int fd, uint64_t nbytes)
{
    struct stat stat;
    if (fstat(fd, &stat) != 0) {
        kvfs_raise(-errno);
        return false;
    }
    if (!S_ISREG(stat.st_mode) || (uint64_t)stat.st_size >= nbytes)
        return true;
    PyErr_Format(PyExc_ValueError,
                 "nbytes: expected at most the size of the file, %lld, found %llu",
                 (long long)stat.st_size, (unsigned long long)nbytes);
    return false;
}

struct how {
    int is_populated;
    int is_synchronous;
    int is_huge;
};

/* Map and populate; returns 0 or -errno. */
static int map_arena(Arena *self, int fd, size_t nbytes, struct how how)
{
    int protection = PROT_READ | (self->is_writable ? PROT_WRITE : 0);
    int advice = self->is_writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
    int flags = how.is_synchronous ? MAP_SHARED_VALIDATE | MAP_SYNC : MAP_SHARED;
    void *mapped = mmap(NULL, nbytes, protection, flags, fd, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    if (how.is_huge)
        (void)madvise(mapped, nbytes, MADV_HUGEPAGE); /* a wish: small pages do, too */
    if (how.is_populated && madvise(mapped, nbytes, advice) != 0) {
        int status = -errno;
        (void)munmap(mapped, nbytes);
        return status;
    }
    self->address = mapped;
    self->nbytes = nbytes;
    return 0;
}

static PyObject *arena_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", "nbytes", "populate", "writable", "sync", "huge", NULL};
    PyObject *nbytes_object;
    uint64_t nbytes;
    int fd, is_writable = 1, status;
    struct how how = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO|pppp", names, &fd, &nbytes_object,
                                     &how.is_populated, &is_writable, &how.is_synchronous,
                                     &how.is_huge) ||
        !kvfs_parse_u64(nbytes_object, "nbytes", 1, (uint64_t)PY_SSIZE_T_MAX, &nbytes) ||
        !check_size(fd, nbytes))
        return NULL;
    Arena *self = (Arena *)kvfs_alloc(type);
    if (self == NULL)
        return NULL;
    self->is_writable = is_writable != 0;
    Py_BEGIN_ALLOW_THREADS
    status = map_arena(self, fd, nbytes, how);
    Py_END_ALLOW_THREADS
    self->is_open = status == 0;
    if (status == 0)
        return (PyObject *)self;
    Py_DECREF(self);
    return kvfs_raise(status);
}

static void unmap(Arena *self)
{
    if (self->is_open)
        (void)munmap(self->address, self->nbytes);
    self->is_open = false;
}

static void arena_dealloc(PyObject *object)
{
    unmap((Arena *)object);
    kvfs_free(object);
}

static PyObject *arena_close(PyObject *object, PyObject *args)
{
    Arena *self = (Arena *)object;
    (void)args;
    if (self->is_open && self->exports > 0)
        return PyErr_Format(PyExc_BufferError, "arena is in use: %u exports", self->exports);
    unmap(self);
    Py_RETURN_NONE;
}

static PyObject *get_address(PyObject *object, void *closure)
{
    const Arena *self = (Arena *)object;
    (void)closure;
    return need_open(self) ? PyLong_FromVoidPtr(self->address) : NULL;
}

static PyObject *get_nbytes(PyObject *object, void *closure)
{
    const Arena *self = (Arena *)object;
    (void)closure;
    return need_open(self) ? PyLong_FromSize_t(self->nbytes) : NULL;
}

static int arena_get_buffer(PyObject *object, Py_buffer *view, int flags)
{
    Arena *self = (Arena *)object;
    if (!need_open(self) ||
        PyBuffer_FillInfo(view, object, self->address, (Py_ssize_t)self->nbytes,
                          !self->is_writable, flags) != 0)
        return -1;
    self->exports++;
    return 0;
}

static void arena_release_buffer(PyObject *object, Py_buffer *view)
{
    Arena *self = (Arena *)object;
    (void)view;
    self->exports--;
}

static PyMethodDef methods[] = {
    {"close", arena_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"address", get_address, NULL, NULL, NULL},
    {"nbytes", get_nbytes, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)arena_new},
    {Py_tp_dealloc, (void *)arena_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {Py_bf_getbuffer, (void *)arena_get_buffer},
    {Py_bf_releasebuffer, (void *)arena_release_buffer},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "kvfs._native.Arena",
    .basicsize = sizeof(Arena),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

bool kvfs_add_arena(PyObject *module)
{
    return kvfs_add_type(module, &spec);
}
