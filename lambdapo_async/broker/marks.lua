-- What the queue knows of a producer, and whether it takes offers now.
-- KEYS[1] = state, KEYS[2] = accepted, KEYS[3] = committed
-- ARGV[1] = producer
local state = redis.call('HMGET', KEYS[1], 'epoch', 'server')
return {state[2] == server_id() and 'OK' or 'WAIT', tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0'),
        tonumber(redis.call('HGET', KEYS[3], ARGV[1]) or '0'), state[1] or ''}
