-- Keep an unreadable group aside. Once per group: a repeated call finds its marker among the newest entries.
-- KEYS[1] = state, KEYS[2] = dead
-- ARGV[1] = fence, ARGV[2] = producer, ARGV[3] = seq, ARGV[4] = reason, ARGV[5] = payload (cut), ARGV[6] = its true bytes,
-- ARGV[7] = entries kept
local newest = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
if newest and newest[2][2] == ARGV[2] and newest[2][4] == ARGV[3] then return {'OK'} end
redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[7], '*', 'p', ARGV[2], 's', ARGV[3], 'reason', ARGV[4], 'payload', ARGV[5],
           'n', ARGV[6])
redis.call('HINCRBY', KEYS[1], 'quarantined', 1)
return {'OK'}
