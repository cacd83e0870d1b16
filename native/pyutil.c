#include "pyutil.h"

#include "guard.h"

#include <errno.h>

Py_buffer *kvfs_take(struct kvfs_views *views, PyObject *object, bool is_writable)
{
    Py_buffer *view = &views->views[views->count];
    int flags = is_writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_GetBuffer(object, view, flags) != 0)
        return NULL;
    views->count++;
    return view;
}

void kvfs_release(struct kvfs_views *views)
{
    while (views->count > 0)
        PyBuffer_Release(&views->views[--views->count]);
}

bool kvfs_count_items(const Py_buffer *view, const char *name, size_t item_bytes, size_t *count)
{
    size_t nbytes = (size_t)view->len;
    if (nbytes % item_bytes != 0) {
        PyErr_Format(PyExc_ValueError, "%s: expected items of %zu bytes, found %zu bytes", name,
                     item_bytes, nbytes);
        return false;
    }
    *count = nbytes / item_bytes;
    return true;
}

bool kvfs_check_items(const Py_buffer *view, const char *name, size_t item_bytes, size_t count)
{
    size_t nbytes = (size_t)view->len;
    if (nbytes % item_bytes == 0 && nbytes / item_bytes == count)
        return true;
    PyErr_Format(PyExc_ValueError, "%s: expected %zu items of %zu bytes, found %zu bytes", name,
                 count, item_bytes, nbytes);
    return false;
}

bool kvfs_parse_u64(PyObject *object, const char *name, uint64_t minimum, uint64_t maximum,
                    uint64_t *value)
{
    PyObject *index = PyNumber_Index(object);
    if (index == NULL)
        return false;
    unsigned long long number = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    bool is_wrong = number == (unsigned long long)-1 && PyErr_Occurred() != NULL;
    if (is_wrong && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return false;
    if (!is_wrong && number >= minimum && number <= maximum) {
        *value = number;
        return true;
    }
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "%s: expected %llu to %llu, found %R", name,
                 (unsigned long long)minimum, (unsigned long long)maximum, object);
    return false;
}

PyObject *kvfs_raise(int status)
{
    errno = -status;
    return PyErr_SetFromErrno(PyExc_OSError);
}

bool kvfs_need_guard(void)
{
    int status = kvfs_guard_install();
    if (status == 0)
        return true;
    kvfs_raise(status);
    return false;
}

bool kvfs_enter(struct kvfs_life *life, const char *what)
{
    if (!life->is_open) {
        PyErr_Format(PyExc_ValueError, "%s is closed", what);
        return false;
    }
    life->users++;
    return true;
}

bool kvfs_leave(struct kvfs_life *life)
{
    life->users--;
    return !life->is_open && life->users == 0;
}

bool kvfs_shut(struct kvfs_life *life)
{
    if (!life->is_open)
        return false;
    life->is_open = false;
    return life->users == 0;
}

bool kvfs_add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type == NULL)
        return false;
    int status = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return status == 0;
}

PyObject *kvfs_alloc(PyTypeObject *type)
{
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return alloc(type, 0);
}

PyObject *kvfs_opened(PyObject *self, struct kvfs_life *life, int status, const char *what,
                      const char *reason)
{
    life->is_open = status == 0;
    if (status == 0)
        return self;
    Py_DECREF(self);
    if (status != -EBADMSG || reason == NULL)
        return kvfs_raise(status);
    return PyErr_Format(PyExc_ValueError, "not %s: %s", what, reason);
}

void kvfs_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}
