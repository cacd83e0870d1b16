/* Hashes, addresses, descriptors and CPU features as Python functions. */
#include "pyutil.h"

#include "cpu.h"
#include "hash.h"
#include "memory.h"
#include "write_back.h"

#include <errno.h>
#include <string.h>

/* Below this a hash takes less time than giving the GIL away and taking it back. */
enum { RELEASE_BYTES_MIN = 65536, PAGE = 4096 };

static PyObject *py_xxh3_64(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "seed", NULL};
    PyObject *data, *seed_object = NULL;
    uint64_t seed = 0, hash;
    struct kvfs_views views = {0};
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O", names, &data, &seed_object) ||
        (seed_object != NULL && !kvfs_parse_u64(seed_object, "seed", 0, UINT64_MAX, &seed)))
        return NULL;
    Py_buffer *view = kvfs_take(&views, data, false);
    if (view == NULL)
        return NULL;
    if (view->len < RELEASE_BYTES_MIN) {
        hash = kvfs_hash_ops()->hash64(view->buf, (size_t)view->len, seed);
    } else {
        Py_BEGIN_ALLOW_THREADS
        hash = kvfs_hash_ops()->hash64(view->buf, (size_t)view->len, seed);
        Py_END_ALLOW_THREADS
    }
    kvfs_release(&views);
    return PyLong_FromUnsignedLongLong(hash);
}

static PyObject *py_xxh3_128(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", NULL};
    PyObject *data;
    uint8_t digest[KVFS_DIGEST_BYTES];
    struct kvfs_views views = {0};
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &data))
        return NULL;
    Py_buffer *view = kvfs_take(&views, data, false);
    if (view == NULL)
        return NULL;
    if (view->len < RELEASE_BYTES_MIN) {
        kvfs_hash_ops()->hash128(view->buf, (size_t)view->len, digest);
    } else {
        Py_BEGIN_ALLOW_THREADS
        kvfs_hash_ops()->hash128(view->buf, (size_t)view->len, digest);
        Py_END_ALLOW_THREADS
    }
    kvfs_release(&views);
    return PyBytes_FromStringAndSize((const char *)digest, sizeof digest);
}

static PyObject *py_buffer_address(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"obj", "writable", NULL};
    PyObject *object;
    int is_writable = 0;
    struct kvfs_views views = {0};
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|p", names, &object, &is_writable))
        return NULL;
    Py_buffer *view = kvfs_take(&views, object, is_writable != 0);
    if (view == NULL)
        return NULL;
    PyObject *result = Py_BuildValue("(Kn)", (unsigned long long)(uintptr_t)view->buf, view->len);
    kvfs_release(&views);
    return result;
}

static PyObject *py_memfd(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"name", "nbytes", "is_final", NULL};
    const char *name;
    PyObject *nbytes_object;
    uint64_t nbytes;
    int is_final = 1;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO|p", names, &name, &nbytes_object,
                                     &is_final) ||
        !kvfs_parse_u64(nbytes_object, "nbytes", 0, (uint64_t)INT64_MAX, &nbytes))
        return NULL;
    int fd = kvfs_memfd(name, nbytes, is_final != 0);
    return fd < 0 ? kvfs_raise(fd) : PyLong_FromLong(fd);
}

static PyObject *py_seal_memfd(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"fd", NULL};
    int fd;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i", names, &fd))
        return NULL;
    int status = kvfs_memfd_seal(fd, true);
    if (status != 0)
        return kvfs_raise(status);
    Py_RETURN_NONE;
}

static PyObject *py_poison(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"address", "nbytes", NULL};
    PyObject *address_object, *nbytes_object;
    uint64_t address, nbytes;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &address_object, &nbytes_object) ||
        !kvfs_parse_u64(address_object, "address", 1, UINTPTR_MAX, &address) ||
        !kvfs_parse_u64(nbytes_object, "nbytes", 1, UINTPTR_MAX, &nbytes))
        return NULL;
    if (address % PAGE != 0 || nbytes % PAGE != 0 || nbytes > UINTPTR_MAX - address) {
        PyErr_SetString(PyExc_ValueError, "address and nbytes must be multiples of 4096");
        return NULL;
    }
    int status = kvfs_poison((uintptr_t)address, nbytes);
    if (status != 0)
        return kvfs_raise(status);
    Py_RETURN_NONE;
}

/* The way of this name, the best one without a name; COUNT if this CPU does not have it. */
static enum kvfs_write_back way_of(const char *name)
{
    enum kvfs_write_back best = kvfs_write_back_best();
    if (name == NULL)
        return best;
    for (enum kvfs_write_back way = KVFS_WRITE_BACK_FENCE; way <= best; way++)
        if (strcmp(name, kvfs_write_back_name(way)) == 0)
            return way;
    return KVFS_WRITE_BACK_COUNT;
}

static PyObject *py_store(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"address", "data", "way", NULL};
    PyObject *address_object, *data;
    uint64_t address;
    const char *name = NULL;
    int32_t status;
    struct kvfs_views views = {0};
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|z", names, &address_object, &data, &name) ||
        !kvfs_parse_u64(address_object, "address", 1, UINTPTR_MAX, &address) || !kvfs_need_guard())
        return NULL;
    enum kvfs_write_back way = way_of(name);
    if (way == KVFS_WRITE_BACK_COUNT)
        return PyErr_Format(PyExc_ValueError, "way: this CPU has no %s, its best is %s", name,
                            kvfs_write_back_name(kvfs_write_back_best()));
    Py_buffer *view = kvfs_take(&views, data, false);
    if (view == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = kvfs_store((void *)(uintptr_t)address, view->buf, (size_t)view->len, way);
    Py_END_ALLOW_THREADS
    kvfs_release(&views);
    return PyLong_FromLong(status);
}

static PyObject *py_touch(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"address", "nbytes", NULL};
    PyObject *address_object, *nbytes_object;
    uint64_t address, nbytes;
    int32_t status;
    (void)module;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &address_object, &nbytes_object) ||
        !kvfs_parse_u64(address_object, "address", 1, UINTPTR_MAX, &address) ||
        !kvfs_parse_u64(nbytes_object, "nbytes", 0, UINTPTR_MAX - address, &nbytes) ||
        !kvfs_need_guard())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = kvfs_touch((void *)(uintptr_t)address, (size_t)nbytes);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(status);
}

static PyObject *py_write_back(PyObject *module, PyObject *args)
{
    (void)module;
    (void)args;
    return PyUnicode_FromString(kvfs_write_back_name(kvfs_write_back_best()));
}

static PyObject *py_cpu_features(PyObject *module, PyObject *args)
{
    const char *names[KVFS_CPU_FEATURES_MAX];
    size_t count = kvfs_cpu_features(names);
    (void)module;
    (void)args;
    PyObject *result = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; result != NULL && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL || PyTuple_SetItem(result, (Py_ssize_t)i, name) != 0)
            Py_CLEAR(result);
    }
    return result;
}

#define METHOD(name) \
    {#name, (PyCFunction)(void (*)(void))py_##name, METH_VARARGS | METH_KEYWORDS, NULL}

PyMethodDef kvfs_misc_methods[] = {
    METHOD(xxh3_64),
    METHOD(xxh3_128),
    METHOD(buffer_address),
    METHOD(memfd),
    METHOD(seal_memfd),
    METHOD(poison),
    METHOD(store),
    METHOD(touch),
    {"write_back", py_write_back, METH_NOARGS, NULL},
    {"cpu_features", py_cpu_features, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};
