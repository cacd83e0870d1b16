/* kvfs._native.Mapping: the mapping as a Python type with a read-only buffer. */
#include "pyutil.h"

#include "guard.h"
#include "mapping.h"

typedef struct {
    PyObject_HEAD
    bool is_open;
    bool is_changing; /* a call without the GIL is at work on the mapping */
    unsigned exports;
    struct kvfs_mapping mapping;
} Mapping;

static bool need_open(const Mapping *self)
{
    if (!self->is_open)
        PyErr_SetString(PyExc_ValueError, "mapping is closed");
    return self->is_open;
}

/* Begin a change; ValueError if closed or changing already on another thread. */
static bool begin_change(Mapping *self)
{
    if (!need_open(self))
        return false;
    if (self->is_changing) {
        PyErr_SetString(PyExc_ValueError, "mapping is being changed by another thread");
        return false;
    }
    self->is_changing = true;
    return true;
}

static PyObject *mapping_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"nbytes", "align", NULL};
    PyObject *nbytes_object, *align_object = NULL;
    uint64_t nbytes, align = KVFS_PAGE;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O", names, &nbytes_object, &align_object) ||
        !kvfs_parse_u64(nbytes_object, "nbytes", 1, KVFS_MAPPING_BYTES_MAX, &nbytes) ||
        (align_object != NULL &&
         !kvfs_parse_u64(align_object, "align", KVFS_PAGE, KVFS_MAPPING_BYTES_MAX, &align)))
        return NULL;
    if ((align & (align - 1)) != 0) {
        PyErr_SetString(PyExc_ValueError, "align: expected a power of two");
        return NULL;
    }
    if (!kvfs_need_guard())
        return NULL;
    Mapping *self = (Mapping *)kvfs_alloc(type);
    if (self == NULL)
        return NULL;
    int status = kvfs_mapping_create(&self->mapping, nbytes, align);
    self->is_open = status == 0;
    if (status == 0)
        return (PyObject *)self;
    Py_DECREF(self);
    return kvfs_raise(status);
}

static void mapping_dealloc(PyObject *object)
{
    Mapping *self = (Mapping *)object;
    if (self->is_open)
        kvfs_mapping_destroy(&self->mapping);
    kvfs_free(object);
}

static PyObject *mapping_close(PyObject *object, PyObject *args)
{
    Mapping *self = (Mapping *)object;
    (void)args;
    if (self->is_open && (self->exports > 0 || self->is_changing)) {
        PyErr_Format(PyExc_BufferError, "mapping is in use: %u exports", self->exports);
        return NULL;
    }
    if (self->is_open)
        kvfs_mapping_destroy(&self->mapping);
    self->is_open = false;
    Py_RETURN_NONE;
}

static PyObject *get_address(PyObject *object, void *closure)
{
    const Mapping *self = (Mapping *)object;
    (void)closure;
    return need_open(self) ? PyLong_FromUnsignedLongLong(self->mapping.address) : NULL;
}

static PyObject *get_nbytes(PyObject *object, void *closure)
{
    const Mapping *self = (Mapping *)object;
    (void)closure;
    return need_open(self) ? PyLong_FromSize_t(self->mapping.nbytes) : NULL;
}

static PyObject *get_has_failed(PyObject *object, void *closure)
{
    const Mapping *self = (Mapping *)object;
    (void)closure;
    return need_open(self) ? PyBool_FromLong(kvfs_range_faults(self->mapping.range) > 0) : NULL;
}

static PyObject *get_faults(PyObject *object, void *closure)
{
    const Mapping *self = (Mapping *)object;
    uint64_t offsets[KVFS_FAULTS_MAX];
    (void)closure;
    if (!need_open(self))
        return NULL;
    size_t count = kvfs_range_offsets(self->mapping.range, offsets);
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *offset = PyLong_FromUnsignedLongLong(offsets[i]);
        int seen = offset == NULL ? -1 : PySequence_Contains(list, offset);
        if (seen < 0 || (seen == 0 && PyList_Append(list, offset) != 0))
            Py_CLEAR(list);
        Py_XDECREF(offset);
    }
    return list;
}

/* Take the four arrays of map(). */
static bool take_extents(struct kvfs_views *views, PyObject *const objects[4],
                         struct kvfs_extents *extents)
{
    const char *const names[4] = {"lengths", "positions", "fds", "offsets"};
    const size_t sizes[4] = {8, 8, 4, 8};
    const void *arrays[4];
    for (int i = 0; i < 4; i++) {
        Py_buffer *view = kvfs_take(views, objects[i], false);
        if (view == NULL)
            return false;
        if (i == 0 && !kvfs_count_items(view, names[0], sizes[0], &extents->count))
            return false;
        if (!kvfs_check_items(view, names[i], sizes[i], extents->count))
            return false;
        arrays[i] = view->buf;
    }
    extents->lengths = arrays[0];
    extents->positions = arrays[1];
    extents->fds = arrays[2];
    extents->offsets = arrays[3];
    return true;
}

static PyObject *mapping_map(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"positions", "fds", "offsets", "lengths", NULL};
    Mapping *self = (Mapping *)object;
    PyObject *objects[4];
    struct kvfs_views views = {0};
    struct kvfs_extents extents = {0};
    PyObject *result = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO", names, &objects[1], &objects[2],
                                     &objects[3], &objects[0]) ||
        !begin_change(self))
        return NULL;
    const char *fault = NULL;
    int status = 0;
    if (take_extents(&views, objects, &extents) && kvfs_need_guard()) {
        fault = kvfs_mapping_fault(&self->mapping, &extents);
        if (fault == NULL) {
            Py_BEGIN_ALLOW_THREADS
            status = kvfs_mapping_map(&self->mapping, &extents);
            Py_END_ALLOW_THREADS
        }
        if (fault != NULL)
            PyErr_SetString(PyExc_ValueError, fault);
        else if (status != 0)
            kvfs_raise(status);
        else
            result = Py_NewRef(Py_None);
    }
    self->is_changing = false;
    kvfs_release(&views);
    return result;
}

static PyObject *mapping_map_anonymous(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"position", "nbytes", NULL};
    Mapping *self = (Mapping *)object;
    PyObject *position_object, *nbytes_object;
    uint64_t position, nbytes;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO", names, &position_object,
                                     &nbytes_object) ||
        !need_open(self) ||
        !kvfs_parse_u64(position_object, "position", 0, self->mapping.mapped_bytes, &position) ||
        !kvfs_parse_u64(nbytes_object, "nbytes", 1, self->mapping.mapped_bytes, &nbytes))
        return NULL;
    if (position % KVFS_PAGE != 0 || nbytes > self->mapping.mapped_bytes - position) {
        PyErr_SetString(PyExc_ValueError,
                        "position must be a multiple of 4096 and the part lie in the range");
        return NULL;
    }
    if (!begin_change(self))
        return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = kvfs_mapping_map_anonymous(&self->mapping, position, nbytes);
    Py_END_ALLOW_THREADS
    self->is_changing = false;
    if (status != 0)
        return kvfs_raise(status);
    return PyLong_FromUnsignedLongLong(self->mapping.address + position);
}

static PyObject *mapping_protect(PyObject *object, PyObject *args)
{
    Mapping *self = (Mapping *)object;
    (void)args;
    if (!begin_change(self))
        return NULL;
    int status;
    Py_BEGIN_ALLOW_THREADS
    status = kvfs_mapping_protect(&self->mapping);
    Py_END_ALLOW_THREADS
    self->is_changing = false;
    if (status != 0)
        return kvfs_raise(status);
    Py_RETURN_NONE;
}

static int mapping_get_buffer(PyObject *object, Py_buffer *view, int flags)
{
    Mapping *self = (Mapping *)object;
    if (!need_open(self))
        return -1;
    void *address = (void *)self->mapping.address;
    if (PyBuffer_FillInfo(view, object, address, (Py_ssize_t)self->mapping.nbytes, 1, flags) != 0)
        return -1;
    self->exports++;
    return 0;
}

static void mapping_release_buffer(PyObject *object, Py_buffer *view)
{
    Mapping *self = (Mapping *)object;
    (void)view;
    self->exports--;
}

static PyMethodDef methods[] = {
    {"map", (PyCFunction)(void (*)(void))mapping_map, METH_VARARGS | METH_KEYWORDS, NULL},
    {"map_anonymous", (PyCFunction)(void (*)(void))mapping_map_anonymous,
     METH_VARARGS | METH_KEYWORDS, NULL},
    {"protect", mapping_protect, METH_NOARGS, NULL},
    {"close", mapping_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"address", get_address, NULL, NULL, NULL},
    {"nbytes", get_nbytes, NULL, NULL, NULL},
    {"has_failed", get_has_failed, NULL, NULL, NULL},
    {"faults", get_faults, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)mapping_new},
    {Py_tp_dealloc, (void *)mapping_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getters},
    {Py_bf_getbuffer, (void *)mapping_get_buffer},
    {Py_bf_releasebuffer, (void *)mapping_release_buffer},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "kvfs._native.Mapping",
    .basicsize = sizeof(Mapping),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

bool kvfs_add_mapping(PyObject *module)
{
    return kvfs_add_type(module, &spec);
}
