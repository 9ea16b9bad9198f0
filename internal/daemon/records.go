package daemon

import (
	"errors"
	"fmt"
	"time"

	"github.com/go-json-experiment/json"

	"keybroker/hypervisor"
	"keybroker/inject"
	"keybroker/internal/store"
)

// Buckets of the store.
const (
	bucketVMs    = "vms"    // domain UUID -> vmRecord
	bucketEpochs = "epochs" // "vm/SUBJECT/NAME" or "service/NAME" -> epochRecord
)

// vmRecord is what is kept of a domain over the broker's restarts.
type vmRecord struct {
	Name        string            `json:"name"`
	Ticket      hypervisor.Ticket `json:"ticket"`
	Denied      bool              `json:"denied,omitzero"` // by an administrator
	Sinks       []string          `json:"sinks,omitzero"`  // last acknowledged
	Releases    int               `json:"releases,omitzero"`
	LastRelease time.Time         `json:"last_release,omitzero"`
}

// epochRecord is what is kept of one key: which epoch is current, and which had a first acknowledgement. A key without a
// record is at epoch 1 of generation 1.
type epochRecord struct {
	Current    uint32 `json:"current"`
	Retired    uint32 `json:"retired,omitzero"` // this epoch and those before it are over
	Generation uint32 `json:"generation"`       // of the master that the current epoch belongs to
	Opened     uint32 `json:"opened,omitzero"`  // the newest epoch that a receiver has opened a volume with
}

func firstEpoch() epochRecord { return epochRecord{Current: 1, Generation: 1} }

// pick returns the epoch that want names, 0 being the current one.
func (e epochRecord) pick(want uint32) (uint32, error) {
	switch {
	case want == 0:
		return e.Current, nil
	case want > e.Current:
		return 0, refusal(inject.CodeUnknownEpoch, "epoch %d is asked for, the current one is %d", want, e.Current)
	case want <= e.Retired:
		return 0, refusal(inject.CodeRetiredEpoch, "epoch %d is retired, the current one is %d", want, e.Current)
	}
	return want, nil
}

func vmEpochKey(subject, name string) string  { return "vm/" + subject + "/" + name }
func serviceEpochKey(name string) string      { return "service/" + name }
func (e epochRecord) mayCreate(n uint32) bool { return n == e.Current && e.Opened < n }

// get reads a stored record into v, and reports whether there is one.
func get(tx store.Tx, bucket, key string, v any) (bool, error) {
	octets, err := tx.Get(bucket, key)
	if errors.Is(err, store.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(octets, v, json.RejectUnknownMembers(true)); err != nil {
		return false, fmt.Errorf("reading %s/%s from the store: %w", bucket, key, err)
	}
	return true, nil
}

func put(tx store.Tx, bucket, key string, v any) error {
	octets, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding %s/%s: %w", bucket, key, err)
	}
	return tx.Put(bucket, key, octets)
}

func getEpoch(tx store.Tx, key string) (epochRecord, error) {
	e := firstEpoch()
	_, err := get(tx, bucketEpochs, key, &e)
	return e, err
}

// vm reads a domain's record; one that was never seen is the zero record.
func (b *Broker) vm(uuid string) (r vmRecord, err error) {
	err = b.store.View(func(tx store.Tx) error {
		_, err := get(tx, bucketVMs, uuid, &r)
		return err
	})
	return r, err
}

// changeVM lets f change a domain's record, in one transaction that is on disk when it returns. Nothing is written when f
// fails or says that it changed nothing.
func (b *Broker) changeVM(uuid string, f func(tx store.Tx, r *vmRecord) (bool, error)) (r vmRecord, err error) {
	errUnchanged := errors.New("unchanged")
	err = b.store.Update(func(tx store.Tx) error {
		r = vmRecord{}
		if _, err := get(tx, bucketVMs, uuid, &r); err != nil {
			return err
		}
		changed, err := f(tx, &r)
		if err != nil {
			return err
		}
		if !changed {
			return errUnchanged
		}
		return put(tx, bucketVMs, uuid, &r)
	})
	if errors.Is(err, errUnchanged) {
		err = nil
	}
	return r, err
}

func refusal(code inject.Code, format string, args ...any) inject.Refusal {
	return inject.Refusal{Code: code, Reason: fmt.Sprintf(format, args...)}
}
