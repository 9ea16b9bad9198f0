package derive

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// keyring is what a keyholder answers from: the schedules of all generations of a realm, the first one's at index 0.
type keyring struct {
	realm     RealmID
	schedules []*Schedule
}

// newKeyring checks a page and makes the schedules over what lies in it.
func newKeyring(page []byte) (*keyring, error) {
	realm, prks, err := parsePage(page)
	if err != nil {
		return nil, err
	}
	k := &keyring{realm: realm}
	for _, prk := range prks {
		s, err := newSchedule(prk)
		if err != nil {
			return nil, err
		}
		k.schedules = append(k.schedules, s)
	}
	if k.schedules[0].RealmID() != realm {
		return nil, fmt.Errorf("%w: its realm id is not that of its first generation", ErrForeignPage)
	}
	return k, nil
}

// answerAll answers every complete request in the order that they lie in in, and returns what is left of in. After an
// error, which the last answer tells too, nothing more may be answered.
func (k *keyring) answerAll(out, in []byte) (answers, rest []byte, err error) {
	for {
		body, rest, ok, err := splitFrame(in, maxRequest)
		if err != nil {
			return appendAnswer(out, statusOf(err), nil), nil, err
		}
		if !ok {
			return out, rest, nil
		}
		if out, err = k.answer(out, body); err != nil {
			return out, nil, err
		}
		in = rest
	}
}

// answer answers one request. Its error is one that ends the keyholder; a mere refusal is an answer.
func (k *keyring) answer(out, body []byte) ([]byte, error) {
	result, err := k.do(body)
	if err == nil {
		out = appendAnswer(out, statusOK, result)
		clear(result)
		return out, nil
	}
	out = appendAnswer(out, statusOf(err), nil)
	if errors.Is(err, ErrRefused) || errors.Is(err, ErrGeneration) {
		return out, nil
	}
	return out, err
}

func (k *keyring) do(body []byte) ([]byte, error) {
	r, err := parseRequest(body)
	if err != nil {
		return nil, err
	}
	switch r.op {
	case opDerive:
		if r.generation < 1 || uint64(r.generation) > uint64(len(k.schedules)) {
			return nil, ErrGeneration
		}
		return k.schedules[r.generation-1].derive(r.info, r.length)
	case opSign:
		return k.schedules[0].sign(r.message)
	}
	return k.hello(), nil
}

func (k *keyring) hello() []byte {
	out := binary.BigEndian.AppendUint32(nil, wireVersion)
	out = append(out, k.realm[:]...)
	return append(out, k.schedules[0].identity...)
}
